"""Threads that pass on the output of this process and its children to stdout and stderr.

Without them a reader that stops (a full pipe, a terminal in Ctrl-S) would block the writer of the
next line: the event loop, or the engine. Here no writer waits: lines without room are dropped and
counted. Knows nothing of the content of lines.
"""

from __future__ import annotations

import fcntl
import os
import queue
import select
import termios
import threading
import time
import tty
from collections.abc import Callable
from contextlib import suppress

_CHUNK_BYTES = 4096
#: Held for a reader that is slow: some 4 MiB at most.
_MAX_CHUNKS = 1024
#: A line longer than this may be dropped in part.
_MAX_LINE_BYTES = 65_536
_PIPE_BYTES = 2**20


class Relay:
    """Stands in the place of a file descriptor from now on, to the end of the process."""

    def __init__(self, fd: int, on_dropped: Callable[[int], None]) -> None:
        """`on_dropped`: called with the number of dropped lines, once there is room again."""
        self._on_dropped = on_dropped
        self._target = os.dup(fd)
        if os.isatty(fd):
            # A terminal stays one, for progress bars.
            self._source, sink = os.openpty()
            tty.setraw(sink)
            termios.tcsetwinsize(sink, termios.tcgetwinsize(fd))
        else:
            self._source, sink = os.pipe()
            with suppress(OSError):  # Smaller is fine too, where the user's share is used up.
                fcntl.fcntl(sink, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        self._queue: queue.Queue[bytes] = queue.Queue(_MAX_CHUNKS)
        self._lock = threading.Lock()
        self._num_dropped = self._num_unwritten = self._num_reported = 0
        #: Writes that the reader had room for.
        self._num_passed = 0
        os.dup2(sink, fd)
        os.close(sink)
        for work in (self._collect, self._write):
            threading.Thread(target=work, name=f"relay-{fd}", daemon=True).start()

    @property
    def num_dropped(self) -> int:
        """Lines that were dropped or never written."""
        return self._num_dropped + self._num_unwritten

    def flush(self, timeout_s: float) -> None:
        """Wait until all lines so far are passed on, or none was for `timeout_s`."""
        num_passed, end_s = self._num_passed, time.monotonic() + timeout_s
        while time.monotonic() < end_s and not self._is_idle():
            time.sleep(0.005)
            if self._num_passed != num_passed:
                num_passed, end_s = self._num_passed, time.monotonic() + timeout_s

    def _is_idle(self) -> bool:
        with self._lock:
            is_unread = bool(select.select([self._source], [], [], 0)[0])
        return not is_unread and not self._queue.unfinished_tasks

    def _collect(self) -> None:
        rest = b""
        while True:
            select.select([self._source], [], [])
            with self._lock:
                try:
                    chunk = os.read(self._source, _CHUNK_BYTES)
                except OSError:  # The end of a terminal; that of a pipe is an empty read.
                    chunk = b""
                if not chunk:
                    return
                rest += chunk
                # Whole lines (or states of a progress bar), so that none is dropped in part.
                end = max(rest.rfind(b"\n"), rest.rfind(b"\r")) + 1
                if not end and len(rest) >= _MAX_LINE_BYTES:
                    end = len(rest)
                lines, rest = rest[:end], rest[end:]
                try:
                    if lines:
                        self._queue.put_nowait(lines)
                except queue.Full:
                    self._num_dropped += lines.count(b"\n")

    def _write(self) -> None:
        while True:
            lines = left = self._queue.get()
            try:
                while left:
                    # It may be non-blocking: other processes that share the file decide that.
                    select.select([], [self._target], [])
                    left = left[os.write(self._target, left) :]
                    self._num_passed += 1
            except OSError:  # The reader is gone for good.
                self._num_unwritten += lines.count(b"\n")
            self._queue.task_done()
            num_unreported = self._num_dropped - self._num_reported
            if num_unreported and self._queue.empty():
                self._num_reported += num_unreported
                self._on_dropped(num_unreported)
