"""Clients of plain HTTP, without certificate authorities: these take 20 ms of CPU time to load."""

from __future__ import annotations

import ssl

#: As `verify` of each client that is created often: it trusts no authority, so TLS would fail.
NO_AUTHORITIES = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
