"""The epsilon report: every number on the page is in the guarantee, nothing is loaded or run, and nothing can be injected."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from functools import cache
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from evidence_cases import evidence_of

from dpsynth.checks.accounting import accounting
from dpsynth.checks.family import decide_family
from dpsynth.checks.mechanism import mechanism
from dpsynth.checks.verdict import Outcome, Verdict
from dpsynth.config import EncoderConfig, GateConfig
from dpsynth.privacy.accountant import account, tpr_at_fpr
from dpsynth.privacy.guarantee import Guarantee
from dpsynth.privacy.mechanism import GaussianQuery, Mechanism, MomentRelease, NonPrivate, PoissonDpSgd
from dpsynth.privacy.unit import PrivacyUnit
from dpsynth.report.epsilon import epsilon_report
from dpsynth.report.html import render
from dpsynth.report.policy import policy_rows

RELEASE = MomentRelease(noise_multiplier=1.0, queries=(GaussianQuery(name="a", share=1.0, clip_norm=1.0),))
SGD = PoissonDpSgd(noise_multiplier=1.5, clip_norm=0.1, sampling_probability=0.1, steps=40, declared_patients=500)
INJECTION = '<script>alert(1)</script><img src="http://evil">'


@cache
def guarantee(mechanisms: tuple[Mechanism, ...] = (RELEASE, SGD), unit: PrivacyUnit = PrivacyUnit.PATIENT) -> Guarantee:
    accounting = account(mechanisms, 1e-5, second_opinion=lambda m, delta: account(m, delta, second_opinion=None).pld)
    return Guarantee(
        data_name=INJECTION,
        unit=unit,
        declared_patients=500,
        mechanisms=mechanisms,
        accounting=accounting,
        ledger_epsilon=accounting.pld,
        max_images_per_patient=8,
        unprotected=(INJECTION,),
    )


def verdict(outcome: Outcome) -> Verdict:
    return Verdict(
        check="copying",
        question="Copies?",
        outcome=outcome,
        statistic_name="share",
        statistic=0.4375,
        interval=(0.125, 0.75),
        threshold=0.5,
        confidence_level=0.95,
        false_alarm_rate=0.01,
        reason=f"7 of 16 patients {INJECTION}",
        limitation="Only whole pictures.",
        figures={"patients": 16.0},
        lower_bound=1.375,
        listed=((3, "MRN-7"),),
        ratios=(0.0815,),
    )


def view(
    site: bool = True,
    outcome: Outcome = Outcome.PASS,
    required: tuple[str, ...] = ("copying",),
    found: Verdict | None = None,
    **changes: object,
) -> dict[str, object]:
    return epsilon_report(
        guarantee=guarantee(**changes),  # type: ignore[arg-type]
        verdicts=[found or verdict(outcome)],
        required=required,
        decision={"allowed": outcome is Outcome.PASS, "reasons": [] if outcome is Outcome.PASS else [INJECTION]},
        budget={"epsilon": 10.0, "delta": 1e-5, "spent": 3.0, "left": 7.0, "gate_attempts": 1, "max_gate_attempts": 3},
        method="diffusion",
        title=INJECTION,
        count=6,
        site=site,
        provenance={"ledger head": "line 3"},
    )


def page(values: dict[str, object], shape: tuple[int, ...] = (1, 8, 8)) -> str:
    images = np.random.default_rng(0).integers(0, 256, (6, *shape), dtype=np.uint8)
    return render(values, images=images, labels=np.array([0, 1, 0, 1, 0, 1]), classes=("normal", INJECTION))


class Tags(HTMLParser):
    """Collects tags and attributes, and that they are balanced."""

    VOID = frozenset({"meta", "img", "br", "link", "path", "use", "rect"})

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))


@pytest.mark.parametrize("outcome", list(Outcome))
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 8, 8), (1, 8, 8, 8)])
def test_the_page_is_well_formed_and_loads_and_runs_nothing(outcome: Outcome, shape: tuple[int, ...]) -> None:
    parser = Tags()
    parser.feed(page(view(outcome=outcome), shape))
    assert parser.open == []
    assert "script" not in {tag for tag, _ in parser.seen}
    for tag, attributes in parser.seen:
        assert not [name for name in attributes if name.startswith("on")], tag
        for name in ("src", "href", "xlink:href"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:", "#")), (tag, value)


def test_every_outcome_is_told_by_a_word_and_a_symbol_not_by_colour_alone() -> None:
    words = set()
    for outcome in Outcome:
        (shown,) = view(outcome=outcome)["verdicts"]  # type: ignore[misc]
        words.add((shown["symbol"], shown["word"]))
        assert shown["symbol"] in page(view(outcome=outcome))
    assert len(words) == len(Outcome)


def test_the_numbers_are_those_of_the_mechanisms() -> None:
    values, claim = view(), guarantee()
    assert values["epsilon"] == claim.accounting.pld
    assert values["sentence"] == claim.sentence()
    for row in values["attack_rates"]:  # type: ignore[attr-defined]
        assert row["tpr"] == pytest.approx(float(tpr_at_fpr(claim.mechanisms, (row["fpr"],))[0]))
    curve = np.array(values["curve"])
    assert (np.diff(curve[:, 1]) >= -1e-9).all()
    assert (curve[:, 1] >= curve[:, 0] - 1e-9).all()
    text = page(values)
    assert f"{claim.accounting.pld:.4g}" in text
    assert f"{claim.accounting.rdp:.4g}" in text


def test_the_sentence_names_unit_and_rates() -> None:
    patient, image = guarantee().sentence(), guarantee(unit=PrivacyUnit.IMAGE).sentence()
    assert "patient level" in patient
    assert "several images is protected less" in image
    found = re.search(r"at most (\d+) in 100", patient)
    assert found is not None
    assert 0 <= int(found[1]) - 100 * guarantee().attack_rate(0.01) < 1  # a bound is rounded up, never down
    stated = re.search(r"epsilon ([\d.]+)", patient)
    assert stated is not None
    assert 0 <= float(stated[1]) - guarantee().epsilon < 0.01


@pytest.mark.parametrize("site", [True, False])
def test_a_check_without_anything_to_test_is_shown_without_numbers(site: bool) -> None:
    untested = replace(verdict(Outcome.PASS), tested=False, reason="nothing was trained by DP-SGD")
    row = page(view(site, found=untested)).partition("<strong>copying</strong>")[2].partition("</tr>")[0]
    assert "there was nothing to test" in row
    assert "no evidence against" not in row
    assert "interval" not in row
    assert "%" not in row
    assert ("nothing was trained by DP-SGD" in row) is site


def test_required_checks_are_told_from_others() -> None:
    assert "(required)" in page(view())
    assert "(for information)" in page(view(required=("membership",)))


def test_without_privacy_the_page_says_so_and_shows_infinity() -> None:
    values = view(outcome=Outcome.FAIL, mechanisms=(NonPrivate(reason="research"),))
    text = page(values)
    assert values["epsilon"] == "inf"
    assert "no privacy guarantee" in text
    assert "infinite" in text
    assert "The gate does not allow the release" in text
    assert not math.isfinite(guarantee((NonPrivate(reason="research"),)).epsilon)


def test_the_public_card_holds_no_number_of_a_check() -> None:
    text = page(view(site=False))
    for secret in ("0.4375", "0.125", "7 of 16", "16.0", "spent, left"):
        assert secret not in text
    assert "0.4375" in page(view(site=True)) or "0.4375" in str(view(site=True))


def test_equal_reports_are_equal_pages() -> None:
    assert page(view()) == page(view())


def test_claim_and_lower_bound_stand_side_by_side_at_the_site_alone() -> None:
    at_site = view()
    assert at_site["lower_bounds"] == [
        {"check": "copying", "proved": 1.375, "claimed": at_site["epsilon"], "limitation": "Only whole pictures."}
    ]
    assert "1.375" in page(at_site)
    assert "no evidence of privacy" in page(at_site)
    public = view(site=False)
    assert public["lower_bounds"] == []
    assert "1.375" not in page(public) + json.dumps(public)


def rows_of(text: str) -> list[str]:
    """The rows of the table of checks, as text without markup."""
    table = text[text.index("<caption>Checks</caption>") :]
    rows = table[: table.index("</table>")].split("<tr>")[2:]
    return [" ".join(re.sub(r"<[^>]+>", " ", row).split()) for row in rows]


def with_verdicts(*verdicts: Verdict, site: bool = True) -> str:
    return page(
        epsilon_report(
            guarantee=guarantee(), verdicts=verdicts, required=("copying",), decision={"allowed": True, "reasons": []},
            budget={"epsilon": 10.0, "delta": 1e-5, "spent": 3.0, "left": 7.0, "gate_attempts": 1, "max_gate_attempts": 3},
            method="moments", title="t", count=6, site=site, provenance={},
        )
    )  # fmt: skip


@pytest.mark.parametrize("site", [True, False])
def test_the_error_of_the_family_is_said_to_be_of_all_together(site: bool) -> None:
    """Five rows that each said 5 % would be read as 25 %; one that broke states no rate and is not said never to err."""
    names = ("mechanism", "membership", "copying", "groups")
    family = decide_family([replace(verdict(Outcome.PASS), check=name, false_alarm_rate=0.05, p_value=0.5) for name in names], 0.05)
    broken = replace(family[3], false_alarm_rate=0.0, statistic=None, interval=None, threshold=None)
    text = with_verdicts(*family[:3], broken, replace(verdict(Outcome.PASS), check="content"), site=site)
    said = "(mechanism, membership, copying, groups) accuse without cause in at most 5 % of honest releases, all of them together"
    assert text.count(said) == 1
    *members, last, other = rows_of(text)
    assert all("5 % (all of the family together)" in row for row in members)
    assert "0 %" not in last
    assert "1 %" in other
    assert "together" not in other
    assert "of the family" not in with_verdicts(verdict(Outcome.PASS), site=site)


def test_what_was_not_measured_is_left_out_instead_of_shown_as_zero() -> None:
    """A run of moments alone has no bound by canaries; a count of problems has no interval."""
    nothing = mechanism(evidence_of(uses_sgd=False), GateConfig())
    (row,) = rows_of(with_verdicts(nothing))
    assert "lower bound on" not in row
    assert not re.search(r"interval|threshold|\b0\b", row)
    (row,) = rows_of(with_verdicts(accounting(evidence_of(uses_sgd=False))))
    assert "problems found 0;" in row
    assert not re.search(r"interval|threshold|100 %", row)
    (row,) = rows_of(with_verdicts(verdict(Outcome.PASS)))
    assert "share 0.4375, 95 % interval 0.125 to 0.75, threshold 0.5; false alarms 1 %" in row


def test_groups_that_were_too_small_are_named_beside_the_answer_at_the_site_alone() -> None:
    small = replace(verdict(Outcome.PASS), check="fairness", not_judged=("sex F, age 60-120", INJECTION))
    at_site, public = with_verdicts(small), with_verdicts(small, site=False)
    assert "too small to be judged: sex F, age 60-120; &lt;script" in at_site
    assert "60-120" not in public
    assert "too small to be judged" not in public


def test_no_patient_of_the_screening_is_in_the_report() -> None:
    for site in (True, False):
        for secret in ("MRN-7", "0.0815"):
            assert secret not in page(view(site=site)) + json.dumps(view(site=site))


def test_the_policy_tells_an_encoders_hash_and_never_where_it_lies() -> None:
    encoder = EncoderConfig(path=Path("/home/dr-a/radimagenet.onnx"), sha256="a" * 64)
    rows = {row["setting"]: row for row in policy_rows(GateConfig(encoder=encoder))}
    assert (rows["encoder.sha256"]["value"], rows["encoder.sha256"]["changed"]) == ("a" * 64, True)
    assert "dr-a" not in json.dumps(rows)
    assert not any(row["changed"] for row in policy_rows(GateConfig()))
