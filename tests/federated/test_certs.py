"""Certificates that TLS itself accepts, and refuses for another name or another CA."""

from __future__ import annotations

import socket
import ssl
import threading
from pathlib import Path

import pytest

from dpsynth.errors import ArtifactError, SignatureError
from federated.certs import CA_CERTIFICATE, SERVER_CERTIFICATE, SERVER_KEY, make_ca, make_node_key, make_server_certificate


@pytest.fixture
def party(tmp_path: Path) -> Path:
    make_ca(tmp_path / "fed", days=2)
    make_server_certificate(tmp_path / "fed", hosts=["fed.example.org", "127.0.0.1"], days=2)
    return tmp_path / "fed"


def handshake(party: Path, ca: Path, name: str) -> None:
    server, client = (ssl.SSLContext(kind) for kind in (ssl.PROTOCOL_TLS_SERVER, ssl.PROTOCOL_TLS_CLIENT))
    server.load_cert_chain(party / SERVER_CERTIFICATE, party / SERVER_KEY)
    client.load_verify_locations(ca)
    ours, theirs = socket.socketpair()

    def answer() -> None:
        try:
            server.wrap_socket(theirs, server_side=True).close()
        except (ssl.SSLError, OSError):
            theirs.close()

    thread = threading.Thread(target=answer)
    thread.start()
    try:
        with ours:
            client.wrap_socket(ours, server_hostname=name).close()
    finally:
        thread.join()


@pytest.mark.parametrize("name", ["fed.example.org", "127.0.0.1"])
def test_sites_reach_the_coordinator_by_its_names(party: Path, name: str) -> None:
    handshake(party, party / CA_CERTIFICATE, name)


def test_another_name_or_another_ca_is_refused(party: Path, tmp_path: Path) -> None:
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(party, party / CA_CERTIFICATE, "evil.example.org")
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(party, make_ca(tmp_path / "other", days=2), "fed.example.org")


def test_keys_are_secret_and_never_overwritten(party: Path, tmp_path: Path) -> None:
    key, _ = make_node_key(tmp_path / "node")
    assert all(path.stat().st_mode & 0o077 == 0 for path in (key, party / "ca.key", party / SERVER_KEY))
    for make in (lambda: make_ca(party, days=2), lambda: make_node_key(tmp_path / "node")):
        with pytest.raises(ArtifactError, match="exists already"):
            make()
    with pytest.raises(SignatureError, match="init-ca"):
        make_server_certificate(tmp_path / "nowhere", hosts=["x"], days=2)
