"""Certificates and keys that Flower asks for: a CA, the coordinator's server certificate, and a key pair for each site's node.

These protect the way of the messages. Whether a guard takes a message depends on the coordinator's signing key alone.
"""

from __future__ import annotations

import datetime
import ipaddress
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from dpsynth.artifacts import write_bytes
from dpsynth.errors import ArtifactError, SignatureError

_PEM = serialization.Encoding.PEM
CA_KEY, CA_CERTIFICATE, SERVER_KEY, SERVER_CERTIFICATE = "ca.key", "ca.crt", "server.key", "server.pem"


def make_ca(folder: Path, *, days: int) -> Path:
    """Write ca.key and ca.crt; returns the latter. An existing CA is never overwritten."""
    _require_new(folder / CA_KEY)
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


def make_server_certificate(folder: Path, *, hosts: Sequence[str], days: int) -> Path:
    """Write server.key and server.pem for the names or addresses that sites dial, signed by the folder's CA."""
    try:
        ca_key = serialization.load_pem_private_key((folder / CA_KEY).read_bytes(), password=None)
        ca = x509.load_pem_x509_certificate((folder / CA_CERTIFICATE).read_bytes())
    except (OSError, ValueError) as error:
        raise SignatureError(f"Expected {CA_KEY} and {CA_CERTIFICATE} in {folder}. `dpsynth-federation init-ca` makes them.") from error
    if not isinstance(ca_key, ec.EllipticCurvePrivateKey):
        raise SignatureError(f"Expected an elliptic-curve key in {CA_KEY}, found another kind.")
    key = ec.generate_private_key(ec.SECP384R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, hosts[0])])
    certificate = (
        _builder(subject, ca.subject, key.public_key(), days)
        .add_extension(x509.SubjectAlternativeName([_general_name(host) for host in hosts]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .sign(ca_key, hashes.SHA384())
    )
    _write_key(folder / SERVER_KEY, key, serialization.PrivateFormat.PKCS8)
    write_bytes(folder / SERVER_CERTIFICATE, certificate.public_bytes(_PEM))
    return folder / SERVER_CERTIFICATE


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
        return x509.DNSName(host)


def _write_key(path: Path, key: ec.EllipticCurvePrivateKey, form: serialization.PrivateFormat) -> None:
    write_bytes(path, key.private_bytes(_PEM, form, serialization.NoEncryption()), private=True)


def _require_new(path: Path) -> None:
    if path.exists():
        raise ArtifactError(f"{path} exists already. Name another folder, or remove it if nobody relies on it.")
