"""CPU time the load generator spends on a chunk of a stream, beside general HTTP clients.

`python bench/load_client.py`: a server in a process of its own sends ready-made events as
fast as they are taken; each client reads them and parses the JSON. Clients that are not installed
are left out. Prints; asserts nothing.
"""

# ruff: noqa: T201 - printing is all a benchmark is for

from __future__ import annotations

import asyncio
import importlib.util
import json
import multiprocessing
import sys
import time
from collections.abc import Awaitable, Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import orjson
import uvloop

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from loadtest.answer import Answer
from loadtest.target import Target

_NUM_CHUNKS = 2000
_NUM_STREAMS = 8
_EVENT = (
    b'data: {"id":"cmpl-0123456789abcdef","object":"text_completion","created":1763800000,'
    b'"model":"SmolLM2-135M-Instruct","choices":[{"index":0,"text":" word","logprobs":null,'
    b'"finish_reason":null}],"usage":null}\n\n'
)
_BODY = {"prompt": "x", "stream": True}
_PATH = "/v1/completions"


async def _answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    head = await reader.readuntil(b"\r\n\r\n")
    length = head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]
    await reader.readexactly(int(length))
    writer.write(
        b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
    )
    for _ in range(_NUM_CHUNKS):
        writer.write(b"%x\r\n%s\r\n" % (len(_EVENT), _EVENT))
        await writer.drain()
        # Longer than a client's turn: each chunk is a read of its own, as tokens are.
        await asyncio.sleep(0.001)
    done = b"data: [DONE]\n\n"
    writer.write(b"%x\r\n%s\r\n0\r\n\r\n" % (len(done), done))
    writer.close()


def _serve(says: Connection) -> None:
    async def serve() -> None:
        server = await asyncio.start_server(_answer, "127.0.0.1", 0)
        says.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(serve())


async def _ours(url: str) -> int:
    target = Target("bench", url)

    async def one() -> int:
        answer = Answer()
        await target.stream(_PATH, _BODY, 600.0, answer)
        return answer.num_pieces

    counts = await asyncio.gather(*(one() for _ in range(_NUM_STREAMS)))
    target.close()
    return sum(counts)


async def _httpx(url: str) -> int:
    import httpx  # noqa: PLC0415 - only the measured client is loaded

    async with httpx.AsyncClient(base_url=url, timeout=600) as client:

        async def one() -> int:
            count = 0
            async with client.stream("POST", _PATH, json=_BODY) as answer:
                async for line in answer.aiter_lines():
                    if line.startswith("data: {"):
                        count += len(json.loads(line[6:])["choices"])
            return count

        return sum(await asyncio.gather(*(one() for _ in range(_NUM_STREAMS))))


async def _aiohttp(url: str) -> int:
    aiohttp: Any = importlib.import_module("aiohttp")
    async with aiohttp.ClientSession(url) as session:

        async def one() -> int:
            count = 0
            async with session.post(_PATH, json=_BODY) as answer:
                async for line in answer.content:
                    if line.startswith(b"data: {"):
                        count += len(orjson.loads(line[6:])["choices"])
            return count

        return sum(await asyncio.gather(*(one() for _ in range(_NUM_STREAMS))))


_CLIENTS: dict[str, Callable[[str], Awaitable[int]]] = {
    "loadtest": _ours,
    "httpx": _httpx,
    "aiohttp": _aiohttp,
}


async def _measure(call: Callable[[str], Awaitable[int]], url: str) -> tuple[float, float]:
    began_s, cpu_s = time.perf_counter(), time.process_time()
    count = await call(url)
    cpu_s = time.process_time() - cpu_s
    assert count == _NUM_CHUNKS * _NUM_STREAMS, count
    return cpu_s / count * 1e6, count / (time.perf_counter() - began_s)


def main() -> None:
    """Print a line for each client."""
    hears, says = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("spawn").Process(target=_serve, args=(says,), daemon=True)
    process.start()
    url = f"http://127.0.0.1:{hears.recv()}"
    print(f"{_NUM_STREAMS} streams     CPU us a chunk     chunks/s")
    for name, call in _CLIENTS.items():
        if name == "loadtest" or importlib.util.find_spec(name):
            cpu_us, rate = uvloop.run(_measure(call, url))
            print(f"{name:12} {cpu_us:17.1f} {rate:12.0f}")
    process.terminate()


if __name__ == "__main__":
    main()
