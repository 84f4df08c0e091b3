"""Ed25519 signatures over in-toto statements in DSSE envelopes.

The bytes that are signed are the bytes that travel: nothing is serialised again before it is verified.
Source: DSSE protocol 1.0 (pre-authentication encoding), in-toto Statement v1, RFC 8032.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from dpsynth.artifacts import write_bytes
from dpsynth.errors import ArtifactError, SignatureError

PAYLOAD_TYPE = "application/vnd.in-toto+json"
STATEMENT_TYPE = "https://in-toto.io/Statement/v1"


def generate_key(folder: Path) -> tuple[Path, Path]:
    """Write signing.key (PKCS 8, readable by its owner only) and signing.pub. An existing key is never overwritten."""
    private_path, public_path = folder / "signing.key", folder / "signing.pub"
    if private_path.exists():
        raise ArtifactError(f"{private_path} exists already. Name another folder; a lost key cannot be made again.")
    key = Ed25519PrivateKey.generate()
    secret = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    write_bytes(private_path, secret, private=True)
    write_bytes(public_path, public_bytes(key.public_key()))
    return private_path, public_path


def load_private(path: Path) -> Ed25519PrivateKey:
    """Read a private key. Raises SignatureError."""
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except (OSError, ValueError, TypeError) as error:
        raise SignatureError(
            f"Expected a private Ed25519 key in PEM at {path}, found {_found(path)}. `dpsynth key FOLDER` makes one."
        ) from error
    if not isinstance(key, Ed25519PrivateKey):
        raise SignatureError(f"Expected an Ed25519 key at {path}, found another kind.")
    return key


def load_public(path: Path) -> Ed25519PublicKey:
    """Read a public key. Raises SignatureError."""
    try:
        key = serialization.load_pem_public_key(path.read_bytes())
    except (OSError, ValueError, TypeError) as error:
        raise SignatureError(
            f"Expected a public Ed25519 key in PEM at {path}, as in the site's signing.pub, found {_found(path)}."
        ) from error
    if not isinstance(key, Ed25519PublicKey):
        raise SignatureError(f"Expected an Ed25519 key at {path}, found another kind.")
    return key


def _found(path: Path) -> str:
    """What lies where a key was expected."""
    if not path.is_file():
        return "a folder" if path.is_dir() else "no file"
    try:
        head = path.read_bytes()[:80]
    except OSError as error:
        return f"a file that cannot be read ({error.strerror})"
    return next((f"a {kind.lower()} key" for kind in ("PRIVATE", "PUBLIC") if f" {kind} KEY-".encode() in head), "another file")


def public_bytes(public: Ed25519PublicKey) -> bytes:
    """The key in PEM, as signing.pub holds it."""
    return public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def key_id(public: Ed25519PublicKey) -> str:
    """SHA-256 of the key's DER form, hexadecimal; it selects a key and proves nothing."""
    der = public.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(der).hexdigest()


def pre_authentication_encoding(payload_type: str, payload: bytes) -> bytes:
    """The bytes that DSSE signs: type and payload with their lengths, so that neither can be moved into the other."""
    kind = payload_type.encode()
    return b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload)


def sign_statement(statement: Mapping[str, Any], private: Ed25519PrivateKey) -> dict[str, Any]:
    """Envelope of a statement: {payload, payloadType, signatures}."""
    payload = json.dumps(statement, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
    signature = private.sign(pre_authentication_encoding(PAYLOAD_TYPE, payload))
    return {
        "payload": base64.b64encode(payload).decode(),
        "payloadType": PAYLOAD_TYPE,
        "signatures": [{"keyid": key_id(private.public_key()), "sig": base64.b64encode(signature).decode()}],
    }


def verify_envelope(envelope: object, public: Ed25519PublicKey) -> dict[str, Any]:
    """The statement, if `public` signed it. The signature is checked before the payload is parsed. Raises SignatureError."""
    payload, signatures = _opened(envelope)
    message = pre_authentication_encoding(PAYLOAD_TYPE, payload)
    if not any(name == key_id(public) and _signed_by(public, signature, message) for name, signature in signatures):
        raise SignatureError("The signature was not made by this key over these bytes. Check the key and where the folder came from.")
    statement = json.loads(payload, object_pairs_hook=_no_duplicates)
    if not isinstance(statement, dict) or statement.get("_type") != STATEMENT_TYPE:
        raise SignatureError(f"Expected an in-toto statement of type {STATEMENT_TYPE}.")
    return statement


def _opened(envelope: object) -> tuple[bytes, list[tuple[str, bytes]]]:
    """Payload, and signatures with the id of their key."""
    try:
        if not isinstance(envelope, dict) or set(envelope) != {"payload", "payloadType", "signatures"}:
            raise ValueError("wrong fields")
        if envelope["payloadType"] != PAYLOAD_TYPE:
            raise ValueError("wrong payload type")
        if len(envelope["signatures"]) != 1 or any(set(entry) != {"keyid", "sig"} for entry in envelope["signatures"]):
            raise ValueError("expected one signature with keyid and sig")
        signatures = [(str(entry["keyid"]), _canonical(entry["sig"])) for entry in envelope["signatures"]]
        return _canonical(envelope["payload"]), signatures
    except (ValueError, TypeError, KeyError, binascii.Error) as error:
        raise SignatureError(f"Expected a DSSE envelope of {PAYLOAD_TYPE}: {error}.") from error


def _canonical(text: str) -> bytes:
    """Decode base64 of which no bit can be changed without changing the bytes. Raises ValueError."""
    content = base64.b64decode(text, validate=True)
    if base64.b64encode(content).decode() != text:
        raise ValueError("base64 is not canonical")
    return content


def _signed_by(public: Ed25519PublicKey, signature: bytes, message: bytes) -> bool:
    try:
        public.verify(signature, message)
    except InvalidSignature:
        return False
    return True


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    if len(set(keys)) != len(keys):
        raise SignatureError("The signed statement repeats a key.")
    return dict(pairs)
