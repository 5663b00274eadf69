"""The server's certificate: checked before anything else starts, read again on demand.

Every error is one line that names the setting. Knows nothing of sockets or of uvicorn.
"""

from __future__ import annotations

import logging
import ssl
from pathlib import Path

from configs.schema import ServerSection
from server.logs import LOGGER_NAME, fields

_log = logging.getLogger(LOGGER_NAME)


class Certificate:
    """The context of all connections; later connections use a reloaded certificate."""

    def __init__(self, section: ServerSection) -> None:
        """Load it. Raises `ValueError` for files that are missing, damaged or of different keys."""
        assert section.ssl_certfile is not None, "there is no certificate without its file"
        self._certfile: Path = section.ssl_certfile
        self._keyfile = section.ssl_keyfile
        self._password = section.ssl_keyfile_password
        self.context = self._loaded()

    def reload(self) -> None:
        """Use the files' new content; if it is wrong, log that and keep the old certificate."""
        try:
            self._loaded()
        except ValueError as error:
            reason = str(error)
            _log.error("certificate not reloaded, the old one stays", extra=fields(reason=reason))
            return
        self._load_into(self.context)
        _log.info("certificate reloaded", extra=fields(file=self._certfile))

    def _loaded(self) -> ssl.SSLContext:
        """Return a new context with the certificate. Raises `ValueError`."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        certificate = _read(self._certfile, "ssl_certfile")
        if "BEGIN CERTIFICATE" not in certificate:
            raise ValueError(f"ssl_certfile {self._certfile} holds no certificate in PEM")
        key = certificate if self._keyfile is None else _read(self._keyfile, "ssl_keyfile")
        try:
            self._load_into(context)
        except ssl.SSLError as error:
            raise ValueError(self._fault(error, key)) from error
        return context

    def _load_into(self, context: ssl.SSLContext) -> None:
        # With None OpenSSL would ask for the password on the terminal.
        context.load_cert_chain(self._certfile, self._keyfile, self._password or "")

    def _fault(self, error: ssl.SSLError, key: str) -> str:
        file = self._keyfile or self._certfile
        if error.reason == "KEY_VALUES_MISMATCH":
            return f"ssl_keyfile {file} is not the key of the certificate {self._certfile}"
        if "PRIVATE KEY" not in key:
            return f"ssl_keyfile: {file} holds no private key in PEM"
        if "ENCRYPTED" in key:
            fault = "is not the password of" if self._password else "is needed for"
            return f"ssl_keyfile_password {fault} {file}"
        reason = (error.reason or str(error)).lower().replace("_", " ")
        return f"ssl_certfile {self._certfile} or the key in {file} is damaged: {reason}"


def _read(path: Path, setting: str) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError as error:
        message = f"{setting} {path} cannot be read: {error.strerror}"
        raise ValueError(message) from error
