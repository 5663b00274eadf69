"""Certificates: an error in one is reported before the start, in one line that names it."""

from __future__ import annotations

import logging
import ssl
from collections.abc import Callable
from pathlib import Path

import pytest
import trustme
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)

from configs.schema import ServerSection
from server.http.tls import Certificate

PASSWORD = "correct horse"  # noqa: S105 - of a key made for this test


class Files:
    """A certificate of a fresh authority, its key, and the key encrypted."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        issued = trustme.CA().issue_cert("127.0.0.1")
        key = issued.private_key_pem.bytes()
        encrypted = load_pem_private_key(key, None).private_bytes(
            Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(PASSWORD.encode())
        )
        chain = b"".join(blob.bytes() for blob in issued.cert_chain_pems)
        self.cert, self.key = folder / "cert.pem", folder / "key.pem"
        self.encrypted, self.both = folder / "encrypted.pem", folder / "both.pem"
        self.missing, self.empty = folder / "missing.pem", folder / "empty.pem"
        self.damaged = folder / "damaged.pem"
        self.cert.write_bytes(chain)
        self.key.write_bytes(key)
        self.encrypted.write_bytes(encrypted)
        self.both.write_bytes(key + chain)
        self.empty.write_bytes(b"")
        self.damaged.write_bytes(chain.replace(b"MII", b"AAA"))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("tls") / "one")


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("tls") / "two")


def serial(certificate: Certificate) -> object:
    """Return the serial number that a client gets, by a handshake in memory."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    client_context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client_context.check_hostname, client_context.verify_mode = False, ssl.CERT_NONE
    server = certificate.context.wrap_bio(to_server, to_client, server_side=True)
    client = client_context.wrap_bio(to_client, to_server)
    for side in (client, server, client, server):
        try:
            side.do_handshake()
        except ssl.SSLWantReadError:
            continue
    return client.getpeercert(binary_form=True)


@pytest.mark.parametrize(
    "chosen",
    [
        lambda files: ServerSection(ssl_certfile=files.cert, ssl_keyfile=files.key),
        lambda files: ServerSection(ssl_certfile=files.both),
        lambda files: ServerSection(
            ssl_certfile=files.cert, ssl_keyfile=files.encrypted, ssl_keyfile_password=PASSWORD
        ),
    ],
    ids=["two files", "one file", "encrypted"],
)
def test_a_certificate_with_its_key_is_shown(
    files: Files, chosen: Callable[[Files], ServerSection]
) -> None:
    shown = serial(Certificate(chosen(files)))
    assert shown == ssl.PEM_cert_to_DER_cert(files.cert.read_text())


@pytest.mark.parametrize(
    ("cert", "key", "password", "told"),
    [
        ("missing", "key", None, "ssl_certfile .*missing.pem cannot be read: No such file"),
        ("cert", "missing", None, "ssl_keyfile .*missing.pem cannot be read: No such file"),
        ("empty", "key", None, "ssl_certfile .*empty.pem holds no certificate"),
        ("key", "key", None, "ssl_certfile .*key.pem holds no certificate"),
        ("cert", None, None, "ssl_keyfile: .*cert.pem holds no private key"),
        ("cert", "empty", None, "ssl_keyfile: .*empty.pem holds no private key"),
        ("cert", "encrypted", None, "ssl_keyfile_password is needed for .*encrypted.pem"),
        ("cert", "encrypted", "wrong", "ssl_keyfile_password is not the password of"),
        ("damaged", "key", None, "ssl_certfile .*damaged.pem .*is damaged"),
    ],
)
def test_what_is_wrong_is_one_line_that_names_it(
    files: Files, cert: str, key: str | None, password: str | None, told: str
) -> None:
    section = ServerSection(
        ssl_certfile=getattr(files, cert),
        ssl_keyfile=None if key is None else getattr(files, key),
        ssl_keyfile_password=password,
    )
    with pytest.raises(ValueError, match=told) as caught:
        Certificate(section)
    assert "\n" not in str(caught.value)


def test_the_key_of_another_certificate_is_refused(files: Files, others: Files) -> None:
    section = ServerSection(ssl_certfile=files.cert, ssl_keyfile=others.key)
    with pytest.raises(ValueError, match=r"key\.pem is not the key of the certificate"):
        Certificate(section)


@pytest.mark.parametrize("given", ["ssl_keyfile", "ssl_keyfile_password"])
def test_a_key_without_a_certificate_is_refused(given: str) -> None:
    with pytest.raises(ValueError, match="need ssl_certfile"):
        ServerSection.model_validate({given: "x"})


def test_a_renewed_certificate_is_shown_and_a_bad_one_is_not(
    tmp_path: Path, files: Files, others: Files, caplog: pytest.LogCaptureFixture
) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    cert.write_bytes(files.cert.read_bytes())
    key.write_bytes(files.key.read_bytes())
    certificate = Certificate(ServerSection(ssl_certfile=cert, ssl_keyfile=key))
    before = serial(certificate)
    cert.write_bytes(others.cert.read_bytes())
    with caplog.at_level(logging.INFO):
        certificate.reload()
    assert "not reloaded" in caplog.text, "the key is still the old one"
    assert serial(certificate) == before
    key.write_bytes(others.key.read_bytes())
    certificate.reload()
    assert serial(certificate) == ssl.PEM_cert_to_DER_cert(others.cert.read_text()) != before
