"""The engine's process: builds the model, then serves one end of a pipe.

Knows nothing of HTTP or of text. It never runs asyncio; a thread drains the pipe, so that what is
said to a busy engine does not pile up in the kernel.
"""

from __future__ import annotations

import gc
import logging
import os
import queue
import signal
import threading
import time
from multiprocessing.connection import Connection
from typing import TypeAlias

from scheduler.engine import Engine
from scheduler.messages import Build, Failed, Ping, Pong, Prepared, Ready, Shutdown, ToEngine
from scheduler.shortage import is_shortage

_log = logging.getLogger(__name__)

#: What the API says, what the engine's own threads say, and why the API cannot be heard any more.
Inbox: TypeAlias = queue.SimpleQueue[ToEngine | Prepared | Exception]


def engine_main(pipe: Connection) -> None:
    """Build what the first message says, say so, then serve the pipe until it closes or ends."""
    # A terminal's Ctrl-C reaches the whole group; when to stop is for the API to say.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        _run(pipe)
    except (BrokenPipeError, ConnectionResetError):
        return  # The API is gone, and with it everybody who could want a token.
    except Exception as fault:
        _log.debug("the engine gives up", exc_info=True)
        pipe.send(Failed(_words_of(fault), is_shortage(fault)))
        raise SystemExit(1) from fault


def _words_of(fault: Exception) -> str:
    """Return a fault's message for an operator, with its class where the message needs one.

    Wrong input is a `ValueError` with a sentence, here as everywhere; so is an `OSError`'s message.
    """
    text = str(fault)
    has_sentence = bool(text) and isinstance(fault, ValueError | OSError)
    return text if has_sentence else f"{type(fault).__name__}: {text}"


def _run(pipe: Connection) -> None:
    try:
        build: Build = pipe.recv()
    except EOFError:
        return
    inbox: Inbox = queue.SimpleQueue()
    is_built = threading.Event()
    # Before the model is built: that may take minutes, and nobody may be left to want it.
    args = pipe, inbox, is_built
    threading.Thread(target=_drain, args=args, name="inbox", daemon=True).start()
    if build.prepare is not None:
        build.prepare()
    runner = build.make_runner()
    engine = Engine(runner, build.config, time.monotonic, inbox.put, pipe.send)
    is_built.set()
    # What is there now stays to the end: collections need not walk it between two tokens.
    gc.collect()
    gc.freeze()
    pipe.send(Ready(runner.info))
    _serve(engine, pipe, inbox)
    engine.close()


def _serve(engine: Engine, pipe: Connection, inbox: Inbox) -> None:
    while True:
        # With nothing to do, sleep until a message comes; else only take what is there.
        is_idle = not engine.has_work
        while is_idle and inbox.empty() and engine.idle():
            pass
        while is_idle or not inbox.empty():
            message = inbox.get()
            is_idle = False
            if isinstance(message, Shutdown):
                return
            if isinstance(message, Exception):
                raise message
            if isinstance(message, Ping):
                pipe.send(Pong())
            else:
                assert not isinstance(message, Build), "an engine is built once"
                engine.handle(message)
        pipe.send(engine.step())


def _drain(pipe: Connection, inbox: Inbox, is_built: threading.Event) -> None:
    try:
        while True:
            inbox.put(pipe.recv())
    except (EOFError, OSError):
        if not is_built.is_set():
            # The main thread is deep in somebody's C++ and hears nothing.
            os._exit(1)
        inbox.put(Shutdown())
    except Exception as fault:  # noqa: BLE001 - the loop raises it
        inbox.put(fault)
