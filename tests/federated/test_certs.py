"""Certificates that TLS itself accepts, and refuses for another name or another CA."""

from __future__ import annotations

import hashlib
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from dpsynth.errors import ArtifactError, SignatureError
from dpsynth.signing import generate_key
from federated import certs
from federated.certs import (
    CA_CERTIFICATE,
    SERVER_CERTIFICATE,
    SERVER_KEY,
    fingerprint,
    make_ca,
    make_node_key,
    make_server_certificate,
    require_server_certificate,
)


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
    for make in (
        lambda: make_ca(party, days=2),
        lambda: make_node_key(tmp_path / "node"),
        lambda: make_server_certificate(party, hosts=["x"], days=2),
    ):
        with pytest.raises(ArtifactError, match="exists already"):
            make()
    with pytest.raises(SignatureError, match="init-ca"):
        make_server_certificate(tmp_path / "nowhere", hosts=["x"], days=2)


def test_a_renewed_certificate_is_another_one_that_the_same_sites_trust(party: Path) -> None:
    before = (party / SERVER_CERTIFICATE).read_bytes()
    make_server_certificate(party, hosts=["fed.example.org"], days=2, renew=True)
    assert (party / SERVER_CERTIFICATE).read_bytes() != before
    handshake(party, party / CA_CERTIFICATE, "fed.example.org")


def _end(party: Path) -> None:
    """A certificate whose days are over."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(certs, "_require_days", lambda days: None)
        make_server_certificate(party, hosts=["x"], days=0, renew=True)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda party: (party / CA_CERTIFICATE).unlink(), "Run: dpsynth-federation init-ca"),
        (lambda party: (party / SERVER_CERTIFICATE).unlink(), "Run: dpsynth-federation server-cert .* --host NAME$"),
        (lambda party: (party / SERVER_KEY).unlink(), "does not belong .* --renew"),
        (lambda party: (party / SERVER_CERTIFICATE).write_text("x"), "expected a certificate in PEM"),
        (lambda party: shutil.copy(make_ca(party / "other", days=2), party / CA_CERTIFICATE), "does not belong .* --renew"),
        (_end, "ended on .* --renew"),
    ],
)
def test_what_stands_in_the_way_of_tls_is_known_before_flower_is_started(party: Path, spoil: Callable[[Path], object], words: str) -> None:
    require_server_certificate(party)
    spoil(party)
    with pytest.raises(SignatureError, match=f"(?i){words}"):
        require_server_certificate(party)


def test_fingerprints_are_those_of_the_tools_that_people_have(party: Path, tmp_path: Path) -> None:
    _, node = make_node_key(tmp_path / "node")
    _, signing = generate_key(tmp_path / "keys")
    assert fingerprint(party / CA_CERTIFICATE) in said(
        "openssl", "x509", "-in", party / CA_CERTIFICATE, "-noout", "-fingerprint", "-sha256"
    )
    assert fingerprint(node) in said("ssh-keygen", "-l", "-f", node).split()
    der = subprocess.run(["openssl", "pkey", "-pubin", "-in", signing, "-outform", "DER"], capture_output=True, check=True).stdout
    assert fingerprint(signing) == hashlib.sha256(der).hexdigest()
    for path in (party / SERVER_KEY, tmp_path / "node" / "node.key", tmp_path / "keys" / "signing.key"):
        with pytest.raises(SignatureError, match="secret key"):
            fingerprint(path)


def said(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, check=True, text=True).stdout
