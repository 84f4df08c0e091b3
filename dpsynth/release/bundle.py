"""The release folder: images, labels, guarantee, outcomes, report, manifest, signature. Built beside its place and moved there whole."""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from dpsynth import __version__
from dpsynth.artifacts import require_new, sha256_file, storage_errors, write_bytes, write_json
from dpsynth.checks.verdict import Verdict
from dpsynth.config import ReleaseConfig
from dpsynth.data.candidates import Candidates
from dpsynth.data.medmnist import write_npz
from dpsynth.detector.model import FILE as DETECTOR
from dpsynth.detector.model import NO_DETECTOR, Detector
from dpsynth.errors import GateRefused
from dpsynth.privacy.guarantee import Guarantee
from dpsynth.progress import Progress
from dpsynth.release.contents import ARCHIVE, TABLE, Contents
from dpsynth.release.gate import Allowed
from dpsynth.release.mark import DISCLOSURE, data_card
from dpsynth.release.metadata import require_expected_metadata
from dpsynth.release.sites import SITES, FederatedSites
from dpsynth.signing import STATEMENT_TYPE, sign_statement

MANIFEST, SIGNATURE = "manifest.json", "manifest.dsse.json"
PREDICATE_TYPE = "urn:dpsynth:release:v1"
SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class Release:
    """What is about to leave. `allowed` comes from the gate and names the candidates it was given for."""

    allowed: Allowed
    release_id: str
    candidates: Candidates
    candidates_sha256: str
    classes: Sequence[str]
    guarantee: Guarantee
    verdicts: Sequence[Verdict]
    required: Sequence[str]
    reviews: dict[str, str]
    method: str
    report_html: str
    ledger_head: tuple[int, str] | None  # none when several hospitals trained: each site's statement names its own
    settings: ReleaseConfig
    detector: Detector | None = None
    policy: Sequence[Mapping[str, Any]] = ()  # rows of `policy_rows`; none when several hospitals trained, each with its own
    no_detector: str = ""  # why there is none though it was asked for
    sites: FederatedSites | None = None

    def __post_init__(self) -> None:
        if self.allowed.candidates_sha256 != self.candidates_sha256:
            raise GateRefused("The gate allowed other images than these. Run `dpsynth check` again.")


def write_release(release: Release, *, out: Path, private: Ed25519PrivateKey, progress: Progress) -> Path:
    """Write the signed folder at `out`. Raises ArtifactError when something is there, StorageError when it cannot be written."""
    require_new(out)
    with storage_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        _write_contents(release, building, progress)
        require_expected_metadata(building, release.candidates.attributes)
        manifest = _manifest(release, building)
        write_json(building / MANIFEST, manifest)
        write_json(building / SIGNATURE, sign_statement(_statement(release, manifest, building), private))
        with storage_errors(out):
            building.chmod(0o755)
            building.rename(out)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return out


def _write_contents(release: Release, folder: Path, progress: Progress) -> None:
    candidates, names = release.candidates, list(release.classes)
    contents = Contents(
        release_id=release.release_id,
        candidates=candidates,
        classes=dict(enumerate(names)),
        guarantee=release.guarantee,
        formats=release.settings.formats,
    )
    _write_images(contents, folder, progress)
    write_npz(folder / ARCHIVE, images=candidates.images, labels=candidates.labels, extra=contents.extra())
    write_bytes(folder / TABLE, contents.table())
    write_json(folder / "guarantee.json", release.guarantee.to_json())
    outcomes = [verdict.to_public_json() for verdict in release.verdicts]
    public = {"required": list(release.required), "verdicts": outcomes, "reviews": release.reviews, "policy": list(release.policy)}
    write_json(folder / "verdicts.json", public)
    write_bytes(folder / "report.html", release.report_html.encode())
    write_bytes(folder / "DISCLOSURE.txt", DISCLOSURE.encode())
    if release.detector is not None:
        write_json(folder / DETECTOR, release.detector.to_json())
    for name, content in release.sites.files().items() if release.sites else ():
        write_bytes(folder / name, content)
    counts = {name: int((candidates.labels == label).sum()) for label, name in enumerate(names)}
    card = data_card(
        title=release.settings.title,
        licence=release.settings.licence,
        contact=release.settings.contact,
        classes=names,
        counts=counts,
        attributes={name: Counter(values.tolist()) for name, values in candidates.attributes.items()},
        guarantee=release.guarantee,
        method=release.method,
        detector=release.detector is not None,
        sites=release.sites.lines() if release.sites else (),
    )
    write_bytes(folder / "README.md", card.encode())


def _write_images(contents: Contents, folder: Path, progress: Progress) -> None:
    """Every image in every wanted format."""
    for index, picture in enumerate(contents.pictures()):
        for kind in contents.formats:
            picture.write(folder, kind)
        if index % 50 == 49 or index + 1 == contents.total:
            progress("write images", index + 1, contents.total)


def release_files(folder: Path) -> list[str]:
    """Every file of a release but the manifest and its signature, relative, in order."""
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    return sorted(name for name in names if name not in (MANIFEST, SIGNATURE))


def _manifest(release: Release, folder: Path) -> dict[str, Any]:
    files = {name: {"sha256": sha256_file(folder / name), "bytes": (folder / name).stat().st_size} for name in release_files(folder)}
    head = release.ledger_head
    return {
        "schema": SCHEMA,
        "dpsynth": __version__,
        "release": release.release_id,
        "synthetic": True,
        "images": len(release.candidates.images),
        **({} if head is None else {"ledger_head": {"lines": head[0], "sha256": head[1]}}),
        **({NO_DETECTOR: release.no_detector} if release.no_detector else {}),
        "files": files,
    }


def _statement(release: Release, manifest: dict[str, Any], folder: Path) -> dict[str, Any]:
    subjects = [{"name": MANIFEST, "digest": {"sha256": sha256_file(folder / MANIFEST)}}]
    subjects += [{"name": name, "digest": {"sha256": entry["sha256"]}} for name, entry in manifest["files"].items()]
    predicate = {"release": release.release_id, "images": manifest["images"], "guarantee": release.guarantee.to_json()}
    if release.sites:
        predicate[SITES] = release.sites.key_ids()
    return {"_type": STATEMENT_TYPE, "subject": subjects, "predicateType": PREDICATE_TYPE, "predicate": predicate}
