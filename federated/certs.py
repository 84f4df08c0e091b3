"""Certificates and keys that Flower asks for: a CA, the coordinator's server certificate, and a key pair for each site's node.

These protect the way of the messages. Whether a guard takes a message depends on the coordinator's signing key alone.
"""

from __future__ import annotations

import base64
import datetime
import hashlib
import ipaddress
import re
import ssl
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from dpsynth.artifacts import write_bytes
from dpsynth.errors import ArtifactError, ConfigError, SignatureError
from dpsynth.signing import key_id

_PEM = serialization.Encoding.PEM
CA_KEY, CA_CERTIFICATE, SERVER_KEY, SERVER_CERTIFICATE = "ca.key", "ca.crt", "server.key", "server.pem"
_LONGEST_DAYS = 3650
_LABEL = re.compile(r"(?!-)[a-z0-9-]{1,63}(?<!-)", re.IGNORECASE)


def make_ca(folder: Path, *, days: int) -> Path:
    """Write ca.key and ca.crt; returns the latter. An existing CA is never overwritten. Raises ArtifactError, ConfigError."""
    _require_new(folder / CA_KEY)
    _require_days(days)
    key = ec.generate_private_key(ec.SECP384R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "dpsynth federation CA")])
    certificate = (
        _builder(name, name, key.public_key(), days)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .sign(key, hashes.SHA384())
    )
    _write_key(folder / CA_KEY, key, serialization.PrivateFormat.PKCS8)
    write_bytes(folder / CA_CERTIFICATE, certificate.public_bytes(_PEM))
    return folder / CA_CERTIFICATE


def make_server_certificate(folder: Path, *, hosts: Sequence[str], days: int, renew: bool = False) -> Path:
    """Write server.key and server.pem for the names or addresses that sites dial, signed by the folder's CA.

    Those that are there are written over to renew them only. Raises SignatureError, ArtifactError, ConfigError.
    """
    _require_days(days)
    names = [_general_name(host) for host in hosts]
    if not renew and (folder / SERVER_CERTIFICATE).exists():
        raise ArtifactError(
            f"{folder / SERVER_CERTIFICATE} exists already. Add --renew to replace it; sites keep their ca.crt, and a running `up` takes "
            "the new one when it is started again."
        )
    try:
        ca_key = serialization.load_pem_private_key((folder / CA_KEY).read_bytes(), password=None)
        ca = x509.load_pem_x509_certificate((folder / CA_CERTIFICATE).read_bytes())
    except (OSError, ValueError) as error:
        raise SignatureError(f"Expected {CA_KEY} and {CA_CERTIFICATE} in {folder}. `dpsynth-federation init-ca` makes them.") from error
    if not isinstance(ca_key, ec.EllipticCurvePrivateKey):
        raise SignatureError(f"Expected an elliptic-curve key in {CA_KEY}, found another kind.")
    key = ec.generate_private_key(ec.SECP384R1())
    subject = x509.Name(
        [x509.NameAttribute(NameOID.COMMON_NAME, hosts[0][:64])]
    )  # a longer one is no common name; TLS reads the names below
    certificate = (
        _builder(subject, ca.subject, key.public_key(), days)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .sign(ca_key, hashes.SHA384())
    )
    _write_key(folder / SERVER_KEY, key, serialization.PrivateFormat.PKCS8)
    write_bytes(folder / SERVER_CERTIFICATE, certificate.public_bytes(_PEM))
    return folder / SERVER_CERTIFICATE


def require_server_certificate(folder: Path) -> None:
    """Raise SignatureError, which names the next step, unless a certificate lies there with its key, its CA signed it, and it holds now."""
    again = f"dpsynth-federation server-cert {folder} --host NAME"
    ca = load_certificate(folder / CA_CERTIFICATE, advice=f"Run: dpsynth-federation init-ca {folder}")
    server = load_certificate(folder / SERVER_CERTIFICATE, advice=f"Run: {again}")
    try:
        server.verify_directly_issued_by(ca)
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(folder / SERVER_CERTIFICATE, folder / SERVER_KEY)
    except (InvalidSignature, ValueError, TypeError, OSError) as error:  # of which an SSLError is one
        raise SignatureError(
            f"{folder / SERVER_CERTIFICATE} does not belong to the {SERVER_KEY} or to the CA beside it. Run: {again} --renew"
        ) from error
    ends = server.not_valid_after_utc
    if ends < datetime.datetime.now(datetime.UTC):
        raise SignatureError(f"{folder / SERVER_CERTIFICATE} ended on {ends:%Y-%m-%d}. Run: {again} --renew")


def load_certificate(path: Path, *, advice: str) -> x509.Certificate:
    """Read a certificate in PEM. Raises SignatureError with `advice`."""
    content = _read(path, "a certificate", advice)
    try:
        return x509.load_pem_x509_certificate(content)
    except ValueError as error:
        raise SignatureError(f"Expected a certificate in PEM at {path}, found another file. {advice}") from error


def require_node_key(path: Path) -> None:
    """Raise SignatureError unless a site's node can use this as its secret key."""
    advice = "Name the node.key that `dpsynth-federation node-key` made."
    content = _read(path, "a node's secret key", advice)
    try:
        key = serialization.load_ssh_private_key(content, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise SignatureError(f"Expected a node's secret key at {path}, found another file. {advice}") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise SignatureError(f"Expected a node's secret key at {path}, found a key of another kind. {advice}")


def node_fingerprint(path: Path) -> str:
    """Fingerprint of a node's public key, as `ssh-keygen -l` prints it. Raises SignatureError for what is none."""
    advice = "Name the node.pub that the site sent; its IT makes it with `dpsynth-federation node-key`."
    public = _public(_read(path, "a node's public key", advice))
    if not isinstance(public, ec.EllipticCurvePublicKey):
        raise SignatureError(f"Expected a node's public key at {path}, found another file. {advice}")
    return _fingerprint(public)


def fingerprint(path: Path) -> str:
    """What to compare by telephone, of any public file that parties send each other. Raises SignatureError."""
    advice = "Name ca.crt, signing.pub or node.pub."
    content = _read(path, "a public key or a certificate", advice)
    if b"PRIVATE KEY" in content:
        raise SignatureError(f"{path} is a secret key, which nobody may be told of. {advice}")
    public = _public(content)
    if public is None:
        raise SignatureError(f"Expected a public key or a certificate at {path}, found another file. {advice}")
    return _fingerprint(public)


def _fingerprint(public: x509.Certificate | Ed25519PublicKey | ec.EllipticCurvePublicKey) -> str:
    """In the form of the tool that people have for it: openssl, ssh-keygen; of a signing key the id that dpsynth prints everywhere."""
    if isinstance(public, x509.Certificate):
        return public.fingerprint(hashes.SHA256()).hex(":").upper()
    if isinstance(public, Ed25519PublicKey):
        return key_id(public)
    line = public.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    return "SHA256:" + base64.b64encode(hashlib.sha256(base64.b64decode(line.split()[1])).digest()).decode().rstrip("=")


def _public(content: bytes) -> x509.Certificate | Ed25519PublicKey | ec.EllipticCurvePublicKey | None:
    for load in (x509.load_pem_x509_certificate, serialization.load_pem_public_key, serialization.load_ssh_public_key):
        try:
            found = load(content)
        except (ValueError, UnsupportedAlgorithm):
            continue
        if isinstance(found, (x509.Certificate, Ed25519PublicKey, ec.EllipticCurvePublicKey)):
            return found
    return None


def _read(path: Path, what: str, advice: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise SignatureError(f"Expected {what} at {path}: {error.strerror or error}. {advice}") from error


def make_node_key(folder: Path) -> tuple[Path, Path]:
    """Write node.key and node.pub in OpenSSH form: with them a site's node says who it is to Flower."""
    _require_new(folder / "node.key")
    key = ec.generate_private_key(ec.SECP384R1())
    _write_key(folder / "node.key", key, serialization.PrivateFormat.OpenSSH)
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    write_bytes(folder / "node.pub", public)
    return folder / "node.key", folder / "node.pub"


def _builder(subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, days: int) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=5))
        .not_valid_after(now + datetime.timedelta(days=days))
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    labels = host.removesuffix(".").split(".")
    if len(host) > 253 or not all(_LABEL.fullmatch(label) for label in labels) or labels[-1].isdigit():
        raise ConfigError(f"--host: expected a name or an address that sites dial, without port, as in fed.example.org; found {host!r}.")
    return x509.DNSName(host)


def _require_days(days: int) -> None:
    if not 1 <= days <= _LONGEST_DAYS:
        raise ConfigError(f"--days: expected 1 to {_LONGEST_DAYS}, found {days}.")


def _write_key(path: Path, key: ec.EllipticCurvePrivateKey, form: serialization.PrivateFormat) -> None:
    write_bytes(path, key.private_bytes(_PEM, form, serialization.NoEncryption()), private=True)


def _require_new(path: Path) -> None:
    if path.exists():
        raise ArtifactError(f"{path} exists already. Name another folder, or remove it if nobody relies on it.")
