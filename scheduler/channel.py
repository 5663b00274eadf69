"""Messages over a socket without ever blocking the event loop: the API's end.

Unsent messages wait here, in order; the first part of a received message is kept until the rest
arrives. Frames are those of `multiprocessing.connection.Connection`, which is the other end.
Knows nothing of the meaning of messages, except that the cancellation of an unsent request just
removes it.
"""

from __future__ import annotations

import asyncio
import logging
import pickle
import socket
import struct
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

from scheduler.messages import Cancel, FromEngine, Submit, ToEngine

_log = logging.getLogger(__name__)

_HEADER = struct.Struct("!i")
#: Read at once, so that other callbacks of the loop are not delayed.
_MAX_READ_BYTES = 256 * 1024


class Channel:
    """One end of a stream socket, on the running event loop.

    `receive` is called with each message; `lose` once, when the peer is gone or a message
    cannot be read. Memory: unsent messages are the callers' own objects; one is pickled.
    """

    def __init__(
        self,
        end: socket.socket,
        receive: Callable[[FromEngine], None],
        lose: Callable[[], None],
    ) -> None:
        end.setblocking(False)  # noqa: FBT003 - the standard library's signature
        self._socket = end
        self._receive = receive
        self._lose = lose
        self._loop = asyncio.get_running_loop()
        #: Not sent: requests by id, others by a key of their own.
        self._unsent: OrderedDict[object, ToEngine] = OrderedDict()
        #: The unsent rest of the current message.
        self._frame = memoryview(b"")
        #: Whether the loop watches for room in the socket.
        self._is_full = False
        self._is_open = True
        self._chunk = memoryview(bytearray(_MAX_READ_BYTES))
        self._received = bytearray()
        self._loop.add_reader(end.fileno(), self._read)

    @property
    def is_drained(self) -> bool:
        """Whether the kernel has all messages."""
        return not self._frame and not self._unsent

    def send(self, message: ToEngine) -> None:
        """Send as much as the socket takes, the rest as soon as there is room.

        Sends nothing to a peer that is gone; `_read` notices its end.
        """
        if isinstance(message, Cancel) and message.request_id in self._unsent:
            del self._unsent[message.request_id]
            return
        key = message.request_id if isinstance(message, Submit) else object()
        self._unsent[key] = message
        if not self._is_full:
            self._write()

    def close(self) -> None:
        """Drop unsent and unread messages. May be called again."""
        if self._is_open:
            self._is_open = False
            self._loop.remove_reader(self._socket.fileno())
            self._loop.remove_writer(self._socket.fileno())
            self._socket.close()

    def _write(self) -> None:
        while not self.is_drained:
            if not self._frame:
                self._frame = memoryview(_framed(self._unsent.popitem(last=False)[1]))
            try:
                self._frame = self._frame[self._socket.send(self._frame) :]
            except BlockingIOError:
                self._watch_for_room(is_full=True)
                return
            except OSError:
                self._unsent.clear()
                self._frame = memoryview(b"")
        self._watch_for_room(is_full=False)

    def _watch_for_room(self, *, is_full: bool) -> None:
        if is_full and not self._is_full:
            self._loop.add_writer(self._socket.fileno(), self._write)
        elif self._is_full and not is_full:
            self._loop.remove_writer(self._socket.fileno())
        self._is_full = is_full

    def _read(self) -> None:
        try:
            num_bytes = self._socket.recv_into(self._chunk)
        except BlockingIOError:
            return
        except OSError:
            num_bytes = 0
        if num_bytes == 0:
            self._end()
            return
        self._received += self._chunk[:num_bytes]
        try:
            for message in self._messages():
                self._receive(message)
        except Exception:  # noqa: BLE001 - nothing behind it can be trusted, whatever it is
            _log.exception("a message of the engine cannot be used")
            self._end()

    def _messages(self) -> Iterator[Any]:
        received, start = self._received, 0
        while self._is_open and len(received) - start >= _HEADER.size:
            (size,) = _HEADER.unpack_from(received, start)
            if size < 0:
                raise ValueError("a message of more than 2 GiB")
            end = start + _HEADER.size + size
            if end > len(received):
                break
            yield pickle.loads(received[start + _HEADER.size : end])  # noqa: S301 - our own child's
            start = end
        del received[:start]

    def _end(self) -> None:
        self.close()
        self._lose()


def _framed(message: ToEngine) -> bytes:
    body = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
    return _HEADER.pack(len(body)) + body
