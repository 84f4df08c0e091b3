"""The attack zoo: what is wrong with each case, the check that must catch it by name, and the honest twin that it must leave alone.

A family makes one hospital (or one key) from a seed and judges all its cases. Counted over many seeds by the slow test and by
experiments/006-false-alarms-and-power/zoo.py, which writes the table of docs/checks.md.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from evidence_cases import evidence_of, features_of
from PIL import Image, ImageDraw, ImageFont
from test_copying_generators import FAILED, GATE, SHOWN
from test_mechanism_audit import FAULTS
from test_mechanism_audit import judged as judged_by_canaries
from test_training_faults import shuffled
from zoo_findings import HONEST_TWIN, Family, Finding, accused, failed, patients
from zoo_memory import copies, diffusion, memorisers, subgroup, volumes, weights

from dpsynth.checks.accounting import accounting
from dpsynth.checks.arms import Arms
from dpsynth.checks.classifier import train_and_predict
from dpsynth.checks.content import content
from dpsynth.checks.evidence import Evidence
from dpsynth.checks.fairness import fairness
from dpsynth.checks.features import encode
from dpsynth.checks.fidelity import fidelity
from dpsynth.checks.plausibility import Reference
from dpsynth.checks.screening import screen
from dpsynth.checks.utility import utility
from dpsynth.checks.verdict import Outcome
from dpsynth.config import ContentConfig
from dpsynth.data.cohort import Float32, ImageSet
from dpsynth.model.moments import Moments, frequencies, to_frequencies
from dpsynth.model.thumbnails import thumbnails
from dpsynth.privacy.noise import NoiseStream
from dpsynth.progress import silent
from dpsynth.train.dpsgd import ENGINE, Engine
from dpsynth.train.selfcheck import sampler_finding

_POLICY = ContentConfig()


# -- the engine --------------------------------------------------------------------------------------------------------


def _canaries(seed: int) -> dict[str, Finding]:
    found = {name: failed(judged_by_canaries(FAULTS[name](), seed), word="canaries") for name in ("noise halved", "clipping off")}
    return found | {f"{HONEST_TWIN}, mechanism": accused(judged_by_canaries(ENGINE, seed))}


def _sampler(seed: int) -> dict[str, Finding]:
    verdicts = []
    for engine in (Engine(sample=shuffled), ENGINE):
        result = sampler_finding(0.1, NoiseStream(key=bytes([seed]) * 32), engine)
        evidence = evidence_of()
        found = {**evidence.selfcheck, "sampler_poisson": {"ok": result.ok, "detail": result.detail}}
        verdicts.append(accounting(replace(evidence, selfcheck=found)))
    return {"shuffled sampling": failed(verdicts[0], word="sampler_poisson"), f"{HONEST_TWIN}, accounting": accused(verdicts[1])}


# -- what the images are like ------------------------------------------------------------------------------------------


def _modes(seed: int) -> dict[str, Finding]:
    real, others = patients(300, seed, 28), patients(150, seed + 1000, 28).images
    rng = np.random.default_rng(seed)
    few = others[rng.integers(3, size=len(others))] + rng.normal(0, 0.03, others.shape).astype(np.float32)
    training, control = (encode(images, task="", progress=silent) for images in (real.images[:150], real.images[150:]))
    verdicts = []
    for drawn in (np.clip(few, -1, 1).astype(np.float32), others):
        features = features_of(encode(drawn, task="", progress=silent), training, control)
        small = replace(features, synthetic_thumbnails=thumbnails(drawn), control_thumbnails=thumbnails(real.images[150:]))
        verdicts.append(fidelity(small, GATE, rng=np.random.default_rng(0)))
    return {"mode collapse": failed(verdicts[0], word="repeat each other"), f"{HONEST_TWIN}, fidelity": accused(verdicts[1])}


def _written_on(images: Float32, seed: int) -> Float32:
    """A name in white on one image in ten, where it happens to lie."""
    rng, written = np.random.default_rng(seed), images.copy()
    for row in range(0, len(images), 10):
        canvas = Image.fromarray(((images[row, 0] + 1) * 127.5).astype(np.uint8))
        place = (int(rng.integers(2, 12)), int(rng.integers(2, 50)))
        ImageDraw.Draw(canvas).text(place, str(rng.choice(["DOE JANE", "SMITH A", "MUELLER"])), fill=255, font=ImageFont.load_default(10))
        written[row, 0] = np.asarray(canvas, dtype=np.float32) / 127.5 - 1
    return written


def _filters(seed: int) -> dict[str, Finding]:
    known, others = patients(400, seed + 2000, 64).images, patients(200, seed, 64).images
    layout = frequencies(known.shape[1:], 10)
    coefficients = to_frequencies(known)
    low, counts = coefficients[:, layout.low], np.array([float(len(known))])
    energy = np.where(layout.band < 0, 0, (coefficients**2).mean(axis=0))[None]
    reference = Reference.of(
        Moments(
            shape=known.shape[1:], low_frequencies=10, counts=counts, mean=low.mean(axis=0)[None],
            covariance=np.cov(low, rowvar=False)[None], variance=energy,
        )
    )  # fmt: skip
    blank = others.copy()
    blank[:5] = 0
    verdicts = []
    for images in (_written_on(others, seed), blank, others):
        screening = screen(images, np.zeros(len(images), dtype=np.int64), reference, _POLICY, sample_key=b"z", progress=silent)
        verdicts.append(content(screening, _POLICY, withheld=0))
    return {
        "burned-in names": failed(verdicts[0], outcome=Outcome.FLAG, word="text"),
        "blank images": failed(verdicts[1], word="contrast"),
        f"{HONEST_TWIN}, content": accused(verdicts[2]),
    }


def _learnt(seed: int) -> dict[str, Finding]:
    real, others = patients(600, seed, 28), patients(400, seed + 1000, 28)
    training, control = real.subset(np.arange(300)), real.subset(np.arange(300, 600))
    women = np.array([mapping["sex"] == "F" for mapping in others.attributes])
    swapped, dropped = replace(others, labels=1 - others.labels), others.subset(np.flatnonzero(~women))

    def arm(images: ImageSet) -> np.ndarray:
        return train_and_predict(images.images, images.labels, control.images, classes=2, seed=0, task="", progress=silent)

    def evidence(drawn: ImageSet) -> Evidence:
        whole = evidence_of(training, control, drawn.images, drawn.labels)
        return replace(whole, synthetic_attributes={"sex": np.array([mapping["sex"] for mapping in drawn.attributes])})

    of_real, verdicts = arm(training), {}
    nowhere = features_of(np.zeros((len(others.images), 1)), np.zeros((300, 1)), np.zeros((300, 1)))
    for name, drawn, check in (("swapped", swapped, utility), ("dropped", dropped, fairness), ("honest", others, utility)):
        ours = arm(drawn)
        arms = Arms(synthetic=ours, real=of_real, both=of_real, synthetic_by_real=np.eye(2)[drawn.labels])
        sets, rng = evidence(drawn), np.random.default_rng(0)
        features = replace(nowhere, synthetic=np.zeros((len(drawn.images), 1)))
        if check is utility or name == "honest":
            verdicts[name] = utility(sets, GATE, arms=lambda arms=arms: arms, rng=rng)
        if check is fairness or name == "honest":
            verdicts[f"{name}, groups"] = fairness(sets, features, GATE, arms=lambda arms=arms: arms)
    return {
        "labels swapped": failed(verdicts["swapped"]),
        "one subgroup dropped": failed(verdicts["dropped, groups"], outcome=Outcome.FLAG, word="sex F"),
        f"{HONEST_TWIN}, utility": Finding(verdicts["honest"].outcome is Outcome.FAIL, verdicts["honest"].reason),
        f"{HONEST_TWIN}, fairness": Finding(verdicts["honest, groups"].outcome is Outcome.FLAG, verdicts["honest, groups"].reason),
    }


FAMILIES = {
    "copies": Family(dict.fromkeys((*FAILED, *SHOWN), "copying"), copies),
    "volumes": Family({"slices of five volumes copied": "screening of volumes"}, volumes),
    "memorisers": Family({"kernel-density memoriser": "membership"}, memorisers),
    "diffusion": Family({"diffusion model overfitted without privacy": "membership"}, diffusion),
    "weights": Family({"net overfitted without noise": "white_box"}, weights),
    "subgroups": Family({"one subgroup memorised": "groups"}, subgroup),
    "canaries": Family({"noise halved": "mechanism", "clipping off": "mechanism"}, _canaries),
    "sampler": Family({"shuffled sampling": "accounting"}, _sampler),
    "modes": Family({"mode collapse": "fidelity"}, _modes),
    "filters": Family({"burned-in names": "content", "blank images": "content"}, _filters),
    "learnt": Family({"labels swapped": "utility", "one subgroup dropped": "fairness"}, _learnt),
}


def counts(name: str, seeds: range) -> dict[str, int]:
    """How many of the hospitals of these seeds each case was caught at, and each twin accused."""
    found = [FAMILIES[name].judge(seed) for seed in seeds]
    return {case: sum(one[case].caught for one in found) for case in found[0]}
