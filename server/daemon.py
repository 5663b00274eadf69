"""The daemon: the composition root, the only module that connects all parts.

Also the only one with sockets and signals of a running server. Its imports take most of a second,
so `server/command.py` starts the engine's process before it imports this module.
"""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import signal
import socket
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from functools import partial

import uvicorn
import uvloop
from fastapi import FastAPI

from configs.load import describe_changes
from configs.schema import OctavoConfig, ServerSection
from configs.sizes import format_size
from model import build
from scheduler.client import ModelInfo
from scheduler.engine_process import SpawnedProcess
from scheduler.process import ProcessClient
from server import __version__
from server.app import create_app
from server.generation.prompts import row_notes
from server.http.keys import Keyring, load_keys, reload_keys
from server.http.lifecycle import Lifecycle
from server.http.protocol import HttpProtocol
from server.http.tls import Certificate
from server.kv_sizes import full_length_requests, kv_bytes
from server.logs import LOGGER_NAME, configure, fields, reported
from server.memory import descendants
from server.start_errors import StartError, UsageError
from server.structured.checker import GrammarService
from server.text.load import chosen_template, load_text
from server.text.prose import prose_token_ids
from server.text.token_bytes import TextError
from server.text.tokenizer import Tokenizer

_log = logging.getLogger(LOGGER_NAME)

_BACKLOG = 2048


def serve(
    config: OctavoConfig, num_lines_dropped: Callable[[], int], spawned: SpawnedProcess
) -> None:
    """Serve until a signal or a failure. The engine is built in `spawned`.

    Raises `StartError`, `UsageError`, `EngineUnavailableError`.
    """
    uvloop.run(_serve(config, num_lines_dropped, spawned))


async def _serve(
    config: OctavoConfig, num_lines_dropped: Callable[[], int], spawned: SpawnedProcess
) -> None:
    keyring, certificate = _guards(config.server)
    chosen = config.model.chat_template
    try:
        chat_template = None if chosen is None else chosen_template(chosen)
    except ValueError as error:
        raise UsageError(str(error)) from None
    # The port before the model: a port in use is an error before seconds of loading.
    listener = _listen(config.server)
    _on_signals(_leave)  # Before the first request there is nothing to drain.
    settings = {"model": config.model.model, **describe_changes(config)}
    _log.info("starting", extra=fields(version=__version__, **settings))
    try:
        async with reported("loading", model=config.model.model):
            source = await asyncio.to_thread(build.resolve_source, config.model.model)
            text = await asyncio.to_thread(load_text, source.path, chat_template=chat_template)
            draft_source = await asyncio.to_thread(_draft_source, config, text.tokenizer)
    except (build.ModelSourceError, TextError, OSError) as error:
        raise StartError(str(error)) from error
    for note in text.notes:
        _log.info("note", extra=fields(note=note))
    tokenizer = text.tokenizer
    make_runner = partial(
        build.make_runner,
        source,
        config,
        tokenizer.eos_token_ids,
        prose_token_ids(tokenizer),
        draft_source,
    )
    prepare = partial(configure, config.server.log_format)
    client = ProcessClient(
        make_runner, config.scheduler, prepare=prepare, disk=config.cache.disk, spawned=spawned
    )
    lifecycle, grammars = Lifecycle(), GrammarService()
    app = create_app(
        config,
        client,
        text,
        version=__version__,
        lifecycle=lifecycle,
        keyring=keyring,
        grammars=grammars,
        num_lines_dropped=num_lines_dropped,
    )
    server = _server(app, certificate, config.server.max_connections_per_address)
    try:
        await _run(config, client, lifecycle, server, listener, tokenizer)
    finally:
        # At the same time: one that hangs must not keep the other alive.
        await asyncio.gather(grammars.close(), client.close())


def _draft_source(config: OctavoConfig, tokenizer: Tokenizer) -> build.ModelSource | None:
    """Find the files of the draft model, if there is to be one.

    Raises `StartError` where its tokens are others than those of `tokenizer`. The sizes of the
    vocabularies are compared by the engine, which reads the weights.
    """
    name = config.scheduler.drafting.draft_model
    if name is None:
        return None
    try:
        source = build.resolve_source(name)
    except build.ModelSourceError as error:
        raise StartError(f"speculation: {error}") from error
    with suppress(TextError):
        other = load_text(source.path).tokenizer
        token_id = tokenizer.first_difference(other)
        if token_id is not None:
            raise StartError(
                f"speculation: the draft model {source.name} has another vocabulary: token "
                f"{token_id} is {other.token_text(token_id)!r}, and "
                f"{tokenizer.token_text(token_id)!r} in the served model"
            )
    return source


def _guards(section: ServerSection) -> tuple[Keyring, Certificate | None]:
    """Load keys and certificate; SIGHUP reads their files again.

    Without such a file SIGHUP ends the program, as when its terminal is closed.
    """
    try:
        keyring = Keyring(load_keys(section))
        certificate = Certificate(section) if section.ssl_certfile else None
    except ValueError as error:
        raise UsageError(str(error)) from None

    def reload() -> None:
        if section.api_key_file:
            reload_keys(keyring, section)
        if certificate:
            certificate.reload()

    if section.api_key_file or certificate:
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, reload)
    return keyring, certificate


async def _run(
    config: OctavoConfig,
    client: ProcessClient,
    lifecycle: Lifecycle,
    server: uvicorn.Server,
    listener: socket.socket,
    tokenizer: Tokenizer,
) -> None:
    stop = asyncio.Event()
    lost = asyncio.Event()

    def on_lost() -> None:
        lost.set()
        stop.set()

    client.on_lost = on_lost
    async with reported("loading the weights"):
        await client.start()
    _on_signals(_stop, stop)
    stopping = asyncio.create_task(stop.wait())
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    url = _url(listener, is_encrypted=server.config.ssl is not None)
    _announce(client.info, config, tokenizer, url)
    await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
    if not lost.is_set():
        hint = "press Ctrl-C again to stop at once"
        timeout_s, running = config.server.drain_timeout_s, lifecycle.num_in_flight
        _log.info("draining", extra=fields(timeout_s=timeout_s, running=running, hint=hint))
        await lifecycle.drain(config.server.drain_timeout_s)
    server.should_exit = True
    await serving
    if lost.is_set():
        raise StartError("the engine died again and again; the log above says why")
    _log.info("stopped")


def _server(app: FastAPI, certificate: Certificate | None, max_per_address: int) -> _Server:
    protocol = partial(
        HttpProtocol, connections_by_address=Counter(), max_per_address=max_per_address
    )
    config = uvicorn.Config(
        app,
        loop="none",
        http=protocol,  # type: ignore[arg-type] # it is only called
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        # Longer than clients keep a connection: the server must not be the first to close it.
        timeout_keep_alive=75,
        timeout_graceful_shutdown=5,
    )
    config.load()
    config.ssl = certificate.context if certificate else None
    return _Server(config)


class _Server(uvicorn.Server):
    """A server that leaves signals to us: the first one drains; uvicorn would cut streams off."""

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve without capturing signals."""
        await self._serve(sockets)


def _on_signals(call: Callable[..., object], *args: object) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, call, *args)


def _stop(stop: asyncio.Event) -> None:
    if stop.is_set():
        _leave()  # The second signal: stop without draining.
    stop.set()


def _leave() -> None:
    """Stop at once, with all children, one of which may be building a model."""
    for pid in list(descendants(os.getpid())):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    os._exit(0)


def _listen(section: ServerSection) -> socket.socket:
    host, port = section.host, section.port
    # A connection is a file; the soft limit is for programs that use `select`.
    max_files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (max_files, max_files))
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        # The explicit protocol makes asyncio turn Nagle's algorithm off.
        listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Connections inherit it. The kernel closes the connection of a client that does not read or
        # has gone; for us it is a client that left.
        timeout_ms = round(section.send_timeout_s * 1000)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, timeout_ms)
        listener.bind((host, port))
        listener.listen(_BACKLOG)
        listener.setblocking(False)  # noqa: FBT003 - the standard library's signature
    except OSError as error:
        reason = error.strerror or str(error)
        raise StartError(f"cannot listen on {host}:{port}: {reason} (--host, --port)") from error
    return listener


def _url(listener: socket.socket, *, is_encrypted: bool) -> str:
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    return f"{'https' if is_encrypted else 'http'}://{shown}:{port}"


def _announce(info: ModelInfo, config: OctavoConfig, tokenizer: Tokenizer, url: str) -> None:
    """Log once, in one line, that it is ready, with the sizes."""
    for note in (*info.notes, *row_notes(tokenizer, info.vocab_size)):
        _log.info("note", extra=fields(note=note))
    _log.info(
        "ready",
        extra=fields(
            url=url,
            model=info.name,
            device=info.device,
            weights=format_size(info.weights_bytes),
            quantization=info.quantization,
            attention=info.attention_backend,
            kv_cache=format_size(kv_bytes(info)),
            kv_cache_dtype=info.kv_cache_dtype,
            kv_bytes_per_token=info.kv_bytes_per_token,
            kv_factor=round(info.kv_factor, 2),
            pages=info.num_pages,
            smallest_reusable_prefix=info.smallest_reusable_prefix_tokens,
            page_size=info.page_size,
            tokens=info.num_pages * info.page_size,
            max_model_len=info.max_model_len,
            full_length_requests=full_length_requests(info),
            speculation=config.scheduler.drafting.kind(info.device),
        ),
    )
