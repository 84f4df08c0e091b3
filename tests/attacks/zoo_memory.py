"""Cases of the zoo that remember their patients: copies, memorisers, and nets that were trained too long."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
from evidence_cases import evidence_of
from test_copying_generators import FAILED, GATE, HONEST, SHOWN, Site, judged, kernel_density, make_site, noisy
from zoo_findings import HONEST_TWIN, Finding, accused, failed, patients
from zoo_nets import drawn_by, overfitted, without_privacy

from dpsynth.checks.encoders import bundled
from dpsynth.checks.evidence import Evidence, compute_features
from dpsynth.checks.family import decide_family, members
from dpsynth.checks.features import encode
from dpsynth.checks.groups import groups
from dpsynth.checks.membership import membership, pool_scores
from dpsynth.checks.verdict import Outcome
from dpsynth.checks.white_box import white_box
from dpsynth.config import DataConfig, GateConfig, PhantomConfig
from dpsynth.data.cohort import Float32, ImageSet
from dpsynth.data.preprocess import prepare
from dpsynth.data.source import read_cohort
from dpsynth.data.split import split_patients
from dpsynth.model.thumbnails import thumbnails
from dpsynth.progress import silent

# -- copies ------------------------------------------------------------------------------------------------------------

_PLANTED = {"one": 1, "seven": 7, "the": 20}


def copies(seed: int) -> dict[str, Finding]:
    verdicts = judged(make_site(seed), {**FAILED, **SHOWN, **HONEST})
    found = {name: failed(verdicts[name], word="training patients are copied") for name in FAILED}
    for name in SHOWN:  # too few for a count: exactly they must go to a person
        listed = {image for image, _ in verdicts[name].listed} == set(range(_PLANTED[name.split()[0]]))
        leak = "10 of them resemble control patients" in verdicts[name].reason or not name.startswith("the pool")
        found[name] = Finding(verdicts[name].outcome in (Outcome.FLAG, Outcome.FAIL) and listed and leak, verdicts[name].reason)
    return found | {f"{HONEST_TWIN}, copying": accused(verdicts["honest"])}


def volumes(seed: int) -> dict[str, Finding]:
    config = DataConfig(spatial_shape=(16, 16, 16), phantom=PhantomConfig(anatomy="brain", num_patients=90, max_images=1, seed=seed))
    images = prepare(read_cohort(config), config, progress=silent)
    site = Site(split_patients(images.subset(np.arange(70)), control_fraction=0.3, key=b"v" * 32), images.subset(np.arange(70, 90)).images)
    copied = site.others.copy()
    for number in range(5):
        copied[number, :, 6:10] = site.split.training.images[number, :, 6:10]
    found = judged(site, {"copied": lambda _: copied, "honest": lambda site: site.others})
    listed = {image for image, _ in found["copied"].listed}
    return {
        "slices of five volumes copied": Finding(listed == set(range(5)), found["copied"].reason),
        f"{HONEST_TWIN}, screening of volumes": Finding(bool(found["honest"].listed), found["honest"].reason),
    }


def memorisers(seed: int) -> dict[str, Finding]:
    site = make_site(seed, 260)
    evidence = site.evidence(site.others)
    honest, drawn = compute_features(evidence, encoder=bundled(), progress=silent), kernel_density(site)
    bad = replace(honest, synthetic=encode(drawn, task="", progress=silent), synthetic_thumbnails=thumbnails(drawn))
    verdicts = []
    for features in (bad, honest):
        scores = pool_scores(evidence, features)
        verdict = membership(evidence, GATE, scores=lambda scores=scores: scores, rng=np.random.default_rng(seed))
        verdicts.append(decide_family([verdict], GATE.family_error)[0])
    return {"kernel-density memoriser": failed(verdicts[0]), f"{HONEST_TWIN}, membership": accused(verdicts[1])}


# -- what was trained too long, and whose --------------------------------------------------------------------------------

_WITH_WEIGHTS = GateConfig(required=(*GATE.required, "white_box"))


def _of_a_pool(seed: int, count: int, side: int) -> Evidence:
    """A hospital whose patients all have coins; nothing is drawn yet."""
    everybody, inside = patients(count, seed, side), np.random.default_rng(seed).random(count) < 0.5
    return evidence_of(everybody.subset(np.flatnonzero(inside)), everybody.subset(np.flatnonzero(~inside)), uses_sgd=False)


def _with(evidence: Evidence, images: Float32, labels: np.ndarray) -> Evidence:
    return replace(evidence, synthetic=images, synthetic_labels=labels)


@cache
def _other(side: int) -> tuple[ImageSet, ImageSet]:
    """A hundred patients of no hospital, for the twins, and public images for everybody."""
    return patients(100, 9001, side), patients(200, 9000, side)


def diffusion(seed: int) -> dict[str, Finding]:
    hospital, (strangers, public), verdicts = _of_a_pool(seed, 200, 16), _other(16), []
    labels = np.arange(200) % 2
    for trained_on in (hospital.training, strangers):
        drawn = drawn_by(overfitted(trained_on, public.images), labels, public.images.shape[1:], seed=seed)
        evidence = _with(hospital, drawn, labels)
        scores = pool_scores(evidence, compute_features(evidence, encoder=bundled(), progress=silent))
        verdict = membership(evidence, GATE, scores=lambda scores=scores: scores, rng=np.random.default_rng(seed))
        verdicts.append(decide_family([verdict], GATE.family_error)[0])
    return {"diffusion model overfitted without privacy": failed(verdicts[0]), f"{HONEST_TWIN}, membership": accused(verdicts[1])}


def weights(seed: int) -> dict[str, Finding]:
    hospital, (strangers, public), verdicts = _of_a_pool(seed, 200, 16), _other(16), []
    for trained_on in (hospital.training, strangers):
        evidence = replace(hospital, generator=without_privacy(trained_on, public))
        verdict = white_box(evidence, _WITH_WEIGHTS, rng=np.random.default_rng(seed), progress=silent)
        verdicts.append(decide_family([verdict], GATE.family_error, family=members(_WITH_WEIGHTS.required))[0])
    return {"net overfitted without noise": failed(verdicts[0], word="weights"), f"{HONEST_TWIN}, white_box": accused(verdicts[1])}


def subgroup(seed: int) -> dict[str, Finding]:
    hospital, others, verdicts = _of_a_pool(seed, 400, 28), patients(400, seed + 1000, 28), []
    theirs = np.flatnonzero([mapping["sex"] == "F" for mapping in hospital.training.attributes])
    rows = theirs[np.random.default_rng(seed).integers(len(theirs), size=200)]
    memorised = np.concatenate([noisy(hospital.training.images[rows], 0.05), others.images[200:]])
    for drawn in (memorised, others.images):
        evidence = _with(hospital, drawn, others.labels)
        features = compute_features(evidence, encoder=bundled(), progress=silent)
        scores = pool_scores(evidence, features)
        verdict = groups(evidence, features, GATE, scores=lambda scores=scores: scores, rng=np.random.default_rng(seed))
        verdicts.append(decide_family([verdict], GATE.family_error)[0])
    named = failed(verdicts[0], outcome=Outcome.FLAG, word="worst is sex F")
    return {"one subgroup memorised": named, f"{HONEST_TWIN}, groups": accused(verdicts[1])}
