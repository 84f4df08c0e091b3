"""The page for a person: exactly the images that are asked about, nothing that runs, and no id or name that becomes markup."""

from __future__ import annotations

import base64
import io
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from cases import verdict
from evidence_cases import evidence_of, image_set
from PIL import Image

from dpsynth.checks.copying import SCREENED_BELOW
from dpsynth.checks.evidence import Evidence
from dpsynth.checks.review import _ASKED, MOST_SHOWN, Answering, review_page
from dpsynth.checks.screening import Screening
from dpsynth.checks.verdict import Outcome, Verdict
from dpsynth.data.candidates import to_unit_range

REQUIRED = ("copying", "fidelity", "content")
ANSWERING = Answering(command="dpsynth release run OUT --key KEY", words="Your words go somewhere.", refusing="dpsynth refuse run")
INJECTION = '<script>alert("x")</script><img src=http://evil onerror=alert(1)>'
SHAPES = [(1, 12, 9), (3, 12, 9), (1, 12, 9, 7)]


class Shown(HTMLParser):
    """Pixels of every picture with its alternative text, in order; and every tag."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.pictures: list[tuple[str, np.ndarray]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        values = dict(attrs)
        assert not [name for name in values if name.startswith("on") or name == "href"]
        if tag == "img":
            assert set(values) == {"alt", "src"}
            source = values["src"] or ""
            assert source.startswith("data:image/png;base64,")
            with Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))) as picture:
                self.pictures.append((values["alt"] or "", np.asarray(picture)))


def planes(image: np.ndarray) -> list[np.ndarray]:
    """What is shown of (channel, *space) uint8: the image, or three central slices."""
    if image.ndim == 3:
        return [image[0] if len(image) == 1 else np.moveaxis(image, 0, -1)]
    _, d, h, w = image.shape
    return [image[0, d // 2], image[0, :, h // 2], image[0, :, :, w // 2]]


def noise(count: int, shape: tuple[int, ...], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


def grounds(count: int, sample: tuple[int, ...] = ()) -> Screening:
    return Screening(
        measured={"contrast": np.full(count, 0.5), "similarity": np.full(count, 0.1), "text": np.zeros(count)},
        limits={"contrast": (0.03, 0.015, False), "similarity": (0.9995, 0.9999, True), "text": (3.5, np.inf, True)},
        sample=np.isin(np.arange(count), sample),
        text_was_read=False,
    )


def copying(listed: tuple[tuple[int, str], ...], outcome: Outcome = Outcome.FLAG) -> Verdict:
    ratios = tuple(0.1 + 0.001 * number for number in range(len(listed)))
    return replace(verdict("copying", outcome), listed=listed, ratios=ratios, figures={SCREENED_BELOW: 0.3217})


def page_of(evidence: Evidence, *verdicts: Verdict) -> str:
    return review_page(evidence, verdicts, required=REQUIRED, answering=ANSWERING, images_sha256="5a" * 32)


def only(page: str, begin: str, end: str = "<h2>") -> str:
    """The part of the page below a heading."""
    assert page.count(f"<h2>{begin}") == 1, begin
    return page.partition(f"<h2>{begin}")[2].partition(end)[0]


@pytest.mark.parametrize("shape", SHAPES)
def test_each_listed_image_stands_beside_the_image_that_it_was_made_of(shape: tuple[int, ...]) -> None:
    """Patients have two images each; the copy is of the second one, once of a training patient and once of a control patient."""
    training, control, synthetic = noise(8, shape, 0), noise(8, shape, 1), noise(6, shape, 2)
    synthetic[4], synthetic[1] = training[5], control[3]
    owners = np.repeat(np.arange(4), 2)
    evidence = evidence_of(
        image_set(to_unit_range(training), np.zeros(8), owners, prefix="t"),
        image_set(to_unit_range(control), np.ones(8), owners, prefix="c"),
        to_unit_range(synthetic),
    )
    page = page_of(replace(evidence, screening=grounds(6)), copying(((4, "t2"), (1, "c1"))))
    assert "This page shows patients and names them." in page
    assert "5a" * 32 in page
    assert "shows patients" not in page_of(replace(evidence, screening=grounds(6)), copying((), Outcome.PASS))
    part = only(page, "Images that come very near")
    shown = Shown(part).pictures
    expected = [
        *[("Synthetic image 4", plane) for plane in planes(synthetic[4])],
        *[("Patient beside synthetic image 4", plane) for plane in planes(training[5])],
        *[("Synthetic image 1", plane) for plane in planes(synthetic[1])],
        *[("Patient beside synthetic image 1", plane) for plane in planes(control[3])],
    ]
    assert [name for name, _ in shown] == [name for name, _ in expected]
    for (_, found), (name, wanted) in zip(shown, expected, strict=True):
        np.testing.assert_array_equal(found, wanted, err_msg=name)
    first, second = part.split("<tr>")[2:]
    assert "patient t2: c0" in first
    assert "trained on" in first
    assert "0.100, 0.322" in first
    assert "patient c1: c1" in second
    assert "control, never to be trained on" in second
    assert "0.101, 0.322" in second


def test_each_image_of_the_filters_has_its_grounds_and_its_double_beside_it() -> None:
    synthetic = noise(9, (1, 12, 12), 3)
    synthetic[6] = synthetic[2]
    screening = grounds(9)
    screening.measured["contrast"][[5, 7]] = 0.02, 0.01
    screening.measured["text"][5] = 8
    screening.measured["similarity"][6] = 0.9997
    evidence = replace(evidence_of(synthetic=to_unit_range(synthetic)), screening=screening)
    part = only(page_of(evidence, verdict("content", Outcome.FLAG)), "Images that the filters name")
    shown = Shown(part).pictures
    names, numbers = [name for name, _ in shown], (7, 5, 6, 2)  # what is rejected comes first
    assert names == [f"Synthetic image {number}" for number in numbers]
    for (_, found), number in zip(shown, numbers, strict=True):
        np.testing.assert_array_equal(found, synthetic[number, 0])
    first, second, third = part.split("<tr>")[2:]
    assert "The policy rejects it." in first
    assert "contrast 0.01: for a person below 0.03, out below 0.015" in first
    assert "contrast 0.02:" in second
    assert "text 8: for a person above 3.5<br>" in second
    assert "rejects" not in second
    assert "similarity 0.9997: for a person above 0.9995, out above 0.9999" in third
    assert "most like image 2" in third


def test_the_sample_is_the_one_that_was_drawn_and_is_shown_without_any_flag() -> None:
    synthetic = noise(30, (1, 8, 8), 4)
    evidence = replace(evidence_of(synthetic=to_unit_range(synthetic)), screening=grounds(30, (3, 11, 29)))
    page = page_of(evidence, copying((), Outcome.PASS), verdict("content"))
    assert "No check asks for a person" in page
    assert "--accept" not in page
    shown = Shown(page).pictures
    assert [name for name, _ in shown] == [f"Synthetic image {number}" for number in (3, 11, 29)]
    for (_, found), number in zip(shown, (3, 11, 29), strict=True):
        np.testing.assert_array_equal(found, synthetic[number, 0])


def test_no_more_are_shown_than_a_person_looks_at_and_the_rest_is_counted() -> None:
    count = MOST_SHOWN + 7
    images = noise(count, (1, 8, 8), 5)
    screening = grounds(count, tuple(range(count)))
    screening.measured["contrast"][:] = 0.02
    evidence = evidence_of(image_set(to_unit_range(images), np.zeros(count), prefix="t"), synthetic=to_unit_range(images))
    page = page_of(replace(evidence, screening=screening), copying(tuple((number, f"t{number}") for number in range(count))))
    for heading, pictures in (("Images that come", 2 * MOST_SHOWN), ("Images that the filters", MOST_SHOWN), ("A sample", MOST_SHOWN)):
        part = only(page, heading)
        assert f"The first {MOST_SHOWN} are shown, 7 are not" in part
        assert len(Shown(part).pictures) == pictures


@pytest.mark.parametrize("check", list(_ASKED))
def test_every_check_that_can_be_flagged_says_what_is_asked_and_gives_the_command(check: str) -> None:
    evidence = replace(evidence_of(), screening=grounds(1))
    asked, accept, refuse = _ASKED[check]
    others = (verdict("fidelity", Outcome.FAIL), verdict("white_box", Outcome.INCONCLUSIVE))
    page = page_of(evidence, verdict("accounting"), verdict(check, Outcome.FLAG), *others)
    text = " ".join(re.sub(r"<[^>]+>", " ", page).split())
    for words in (asked, accept, refuse, "because", "Your words go somewhere.", "fidelity (fail)"):
        assert words in text
    assert "white_box" not in text, "what no policy requires stops nothing"
    assert f"dpsynth release run OUT --key KEY \\\n    --accept &#39;{check}=NAME: WHY&#39;" in page


def test_an_id_a_label_or_an_attribute_is_text_and_never_markup() -> None:
    """Attack: whoever names a patient, a class or a group writes into the page that the officer opens."""
    images = to_unit_range(noise(4, (1, 8, 8), 6))
    hostile = replace(image_set(images, np.zeros(4)), patient_ids=(INJECTION, "a", "b", "c"), classes=(INJECTION, "c1"))
    evidence = replace(
        evidence_of(hostile, synthetic=images), screening=grounds(4, (0, 1)), synthetic_attributes={"sex": np.array([INJECTION] * 4)}
    )
    flagged = [replace(verdict(check, Outcome.FLAG), reason=INJECTION) for check in ("content", "groups")]
    shown = Shown(page_of(evidence, copying(((2, INJECTION),)), *flagged))
    assert "script" not in shown.tags
    assert len(shown.pictures) == 4
    assert page_of(evidence, copying(((2, INJECTION),))).count("patient &lt;script&gt;") == 1
