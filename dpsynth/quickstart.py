"""The whole way on procedural images, in one folder and a few minutes: what a hospital would do, step by step."""

from __future__ import annotations

from pathlib import Path

from dpsynth.artifacts import write_bytes
from dpsynth.checks.run import check
from dpsynth.checks.verdict import REVIEW, look_at
from dpsynth.config import load_config
from dpsynth.data.fingerprint import open_ledger
from dpsynth.errors import ArtifactError, GateRefused
from dpsynth.generate import generate
from dpsynth.progress import Progress
from dpsynth.release.run import release, report
from dpsynth.release.verify import verify
from dpsynth.signing import generate_key
from dpsynth.train.run import train

CONFIG = """\
# A demonstration on the built-in phantom cohort: no private data, nothing to download.
method: diffusion
data:
  format: phantom
  name: phantom-chest
  classes: [normal, lesion]
  declared_patients: 4000
  spatial_shape: [20, 20]
  control_fraction: 0.2
  phantom: {anatomy: chest, num_patients: 5000, max_images: 2, seed: 1}
privacy: {epsilon: 10, delta: 1e-5}
moments: {low_frequencies: 10}
pretrain: {source: phantom, anatomies: [chest], num_phantoms: 1500, steps: 400}
diffusion: {trainable: small, steps: 20, sampling_probability: 0.05}
generate: {count: 2000}
release: {formats: [png], title: Phantom chest images}
"""
# A demonstration that tried until the gate said yes would show how not to do it.
_BY_CHANCE = (
    "The privacy checks accuse an honest run by chance in a few of 100 (docs/checks.md); the report says what was found. A hospital "
    "would ask its officer. Here, try again in another folder: a second refusal in a row is hardly chance."
)


def quickstart(folder: Path, *, progress: Progress) -> None:
    """Open a ledger, train, generate, check, report, release and verify in `folder`. Raises what the steps raise."""
    if folder.exists() and any(folder.iterdir()):
        raise ArtifactError(f"Expected {folder} not to exist, found files in it. Name another folder, or remove it.")
    config_path, run, ledger, out = folder / "config.yaml", folder / "run", folder / "phantom.ledger.jsonl", folder / "release"
    folder.mkdir(parents=True, exist_ok=True)
    write_bytes(config_path, CONFIG.encode())
    config = load_config(config_path)
    print("1/7 The data owner opens the ledger: epsilon 10 over all runs.")
    open_ledger(config, path=ledger, epsilon=10.0, delta=1e-5, max_gate_attempts=3, progress=progress)
    print("2/7 Train under differential privacy.")
    guarantee = train(config, run_path=run, ledger_path=ledger, progress=progress)
    print(f"    {guarantee.sentence()}")
    print("3/7 Draw synthetic images.")
    generate(run, progress=progress)
    print("4/7 Check them against training and control patients.")
    verdicts = check(run, ledger_path=ledger, progress=progress)
    for verdict in verdicts:
        print(f"    {verdict.line()}")
    print(f"    {look_at(verdicts, run / 'check' / REVIEW)}")
    print("5/7 Write the epsilon report.")
    print(f"    Report:  {report(run, ledger_path=ledger)}")
    print("6/7 Ask the gate, sign and release.")
    generate_key(folder / "keys")
    try:
        release(run, out=out, key_path=folder / "keys" / "signing.key", ledger_path=ledger, reviews={}, progress=progress)
    except GateRefused as refused:
        raise GateRefused(f"{refused} {_BY_CHANCE}") from refused
    print("7/7 Verify as a recipient would.")
    problems = verify(out, folder / "keys" / "signing.pub")
    if problems:
        raise GateRefused("The released folder does not verify: " + "; ".join(problems))
    print(f"true\nReport:  {run / 'report' / 'report.html'}\nRelease: {out}")
