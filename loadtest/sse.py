"""Server-sent events from bytes that arrive in any pieces. Pure; knows nothing of their content."""

from __future__ import annotations


class EventReader:
    """Splits a stream into the data of its events, as the WHATWG standard reads them.

    Lines may end in LF, CRLF or CR; comments, and fields other than `data`, are dropped. Bytes are
    only decoded whole, so that a character may be cut between two reads.
    """

    def __init__(self) -> None:
        self._rest = b""
        self._ended_with_cr = False

    def feed(self, data: bytes) -> list[bytes]:
        """Add bytes and return the data of each event that is complete by now."""
        if self._ended_with_cr and data:
            # A CRLF that was cut in two is one line end.
            data = data.removeprefix(b"\n")
            self._ended_with_cr = False
        if b"\r" in data:
            self._ended_with_cr = data.endswith(b"\r")
            data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        *events, self._rest = (self._rest + data).split(b"\n\n")
        found = [_data_of(event) for event in events]
        return [data for data in found if data is not None]


def _data_of(event: bytes) -> bytes | None:
    # The form of nearly every event.
    if event.startswith(b"data: ") and b"\n" not in event:
        return event[6:]
    values = []
    for line in event.split(b"\n"):
        name, _, value = line.partition(b":")
        if name == b"data":
            values.append(value.removeprefix(b" "))
    return b"\n".join(values) if values else None
