"""The engine's process: builds the model, then serves one end of a pipe.

Knows nothing of HTTP or of text. It never runs asyncio; a thread drains the pipe, so that
messages to a busy engine do not pile up in the kernel.
"""

from __future__ import annotations

import gc
import logging
import os
import queue
import signal
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import TypeAlias

from scheduler.engine import Engine
from scheduler.messages import (
    Build,
    Failed,
    Loaded,
    Ping,
    Pong,
    Prepared,
    Ready,
    Shutdown,
    ToEngine,
)
from scheduler.shortage import is_shortage
from scheduler.tier.open_tier import open_tier
from scheduler.tier.tiered_engine import TieredEngine

_log = logging.getLogger(__name__)

#: Messages of the API and of the engine's threads, and the error that ended the pipe.
Inbox: TypeAlias = queue.SimpleQueue[ToEngine | Prepared | Loaded | Exception]


def engine_main(pipe: Connection, preload: Callable[[], None] | None = None) -> None:
    """Build the model, send `Ready`, then serve the pipe until it closes or `Shutdown` arrives.

    `preload` is called before the message `Build` is waited for.
    """
    # A terminal's Ctrl-C reaches the whole group; the API decides when to stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        if preload is not None:
            # Imports make hundreds of thousands of objects that stay: no collection walks them.
            gc.disable()
            preload()
            gc.freeze()
            gc.enable()
        _run(pipe)
    except (BrokenPipeError, ConnectionResetError):
        return  # The API is gone, and with it all clients.
    except Exception as fault:
        _log.debug("the engine fails", exc_info=True)
        pipe.send(Failed(_message_of(fault), is_shortage(fault)))
        raise SystemExit(1) from fault


def _message_of(fault: Exception) -> str:
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
    # Before the model is built: that may take minutes, and the API may end meanwhile.
    args = pipe, inbox, is_built
    threading.Thread(target=_drain, args=args, name="inbox", daemon=True).start()
    if build.prepare is not None:
        build.prepare()
    runner = build.make_runner()
    engine: Engine | TieredEngine
    engine = Engine(runner, build.config, time.monotonic, inbox.put, pipe.send)
    if build.disk is not None:
        engine = open_tier(engine, build.disk, inbox.put)
    is_built.set()
    # Objects made so far stay to the end: collections need not walk them between two tokens.
    gc.collect()
    gc.freeze()
    pipe.send(Ready(runner.info))
    _serve(engine, pipe, inbox)
    engine.close()


def _serve(engine: Engine | TieredEngine, pipe: Connection, inbox: Inbox) -> None:
    while True:
        # With nothing to do, sleep until a message comes; else only read waiting ones.
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
            elif isinstance(message, Loaded):
                assert isinstance(engine, TieredEngine), "no pages are loaded without a disk tier"
                engine.handle(message)
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
            # The main thread is in foreign C++ code and cannot be interrupted.
            os._exit(1)
        inbox.put(Shutdown())
    except Exception as fault:  # noqa: BLE001 - the loop raises it
        inbox.put(fault)
