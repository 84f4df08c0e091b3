"""Which data a ledger belongs to.

The digest is salted and never leaves the site: a plain hash of images answers "was it in there?".
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from pathlib import Path

from dpsynth.artifacts import sha256_file
from dpsynth.config import Config, DataConfig
from dpsynth.data.cohort import Cohort
from dpsynth.data.source import read_cohort
from dpsynth.data.validate import decoded, require_usable
from dpsynth.errors import DataError
from dpsynth.privacy.calibrate import resolve_delta
from dpsynth.privacy.ledger import Ledger
from dpsynth.progress import Progress


def fingerprint(cohort: Cohort, data: DataConfig, *, salt: bytes, progress: Progress) -> str:
    """Salted digest over patients, labels, decoded pixels and the list of exclusions, whatever the order of files.

    Raises DataError for broken images, and for images of different sizes unless the configuration allows them.
    """
    dimensions, first = len(data.spatial_shape), None
    total = hmac.new(salt, digestmod=hashlib.sha256)
    if data.exclusions is not None:
        total.update(b"exclusions:" + bytes.fromhex(sha256_file(data.exclusions)))
    records = sorted(cohort.records, key=lambda record: (record.patient_id, record.name))
    for index, record in enumerate(records):
        image = decoded(record, dimensions=dimensions, channels=data.channels)
        voxels = image.voxels
        first = first or (record.name, voxels.shape[1:])
        if voxels.shape[1:] != first[1] and not data.mixed_sizes:
            raise DataError(
                f"{record.name}: expected {'x'.join(map(str, first[1]))} as in {first[0]}, found {'x'.join(map(str, voxels.shape[1:]))}. "
                "Set data.mixed_sizes: true to resample each image, or leave it out."
            )
        header = f"{len(record.patient_id)}:{record.patient_id}:{record.label}:{voxels.shape}:{image.spacing_mm}"
        total.update(header.encode() + hashlib.sha256(voxels.tobytes()).digest())
        if index % 50 == 49 or index + 1 == len(records):
            progress("fingerprint", index + 1, len(records))
    return total.hexdigest()


def require_data(cohort: Cohort, data: DataConfig, ledger: Ledger, *, progress: Progress) -> None:
    """Raise LedgerError unless the ledger is for these images, labels and patients."""
    ledger.require_data(_digest(cohort, data, ledger, progress))


def change_data(data: DataConfig, ledger: Ledger, *, who: str, why: str, progress: Progress) -> None:
    """Read the data set as it is now and note in its ledger that it changed. Raises LedgerError when it did not."""
    cohort = read_cohort(data)
    require_usable(cohort)
    ledger.change_data(_digest(cohort, data, ledger, progress), who=who, why=why)


def _digest(cohort: Cohort, data: DataConfig, ledger: Ledger, progress: Progress) -> str:
    return fingerprint(cohort, data, salt=ledger.digest_salt, progress=progress)


def open_ledger(config: Config, *, path: Path, epsilon: float, delta: float | None, max_gate_attempts: int, progress: Progress) -> Ledger:
    """Read the data set of `config` once and open its ledger with the owner's budget."""
    cohort = read_cohort(config.data)
    require_usable(cohort)
    salt = secrets.token_bytes(16)
    digest = fingerprint(cohort, config.data, salt=salt, progress=progress)
    return Ledger.open_new(
        path,
        data_name=config.data.name,
        unit=config.data.unit,
        epsilon=epsilon,
        delta=resolve_delta(delta, config.data.declared_patients),
        max_gate_attempts=max_gate_attempts,
        data_digest=digest,
        digest_salt=salt.hex(),
    )
