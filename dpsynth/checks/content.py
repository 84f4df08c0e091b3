"""Are the synthetic images fit to be looked at: none blank, doubled, implausible or written on?"""

from __future__ import annotations

import math

from scipy import stats

from dpsynth.checks.burned_text import SMALLEST_SIDE
from dpsynth.checks.screening import Decision, Screening
from dpsynth.checks.statistics import clopper_pearson
from dpsynth.checks.verdict import Outcome, Verdict
from dpsynth.config import ContentConfig

QUESTION = "Is any synthetic image blank, saturated, a double of another, far from what was released about its kind, or written on?"
LIMITATION = (
    "It sees gross faults of single images, not medical ones: anatomy is compared in its coarse shape alone, a quarter of the images of "
    f"another body part pass. Text is looked for from {SMALLEST_SIDE} pixels on, and small print is missed unless it is read."
)


_HONEST = 4100  # real and procedural images of which none was rejected, nor for a person but for text (docs/checks.md)
WITHOUT_CAUSE = 1 - 0.05 ** (1 / _HONEST)  # of honest images of those kinds at most, with confidence 95 %: an upper limit, not a rate


def content(screening: Screening | None, policy: ContentConfig, *, withheld: int) -> Verdict:
    """FAIL when more than the policy's share was rejected, withheld ones included, or a rejected image is still there; FLAG when an image
    is for a person; INCONCLUSIVE when nothing was screened. `withheld`: images that were left out when the candidates were drawn.

    The stated false-alarm rate is that of failing. How often a person is asked without cause grows with the number of images; the reason
    says how many are to be expected at the most.

    Nothing in it was computed on patients, so its numbers may leave.
    """
    if screening is None or not len(screening):
        return _verdict(Outcome.INCONCLUSIVE, "the images were not screened", 0, 0, policy, {})
    left, review = int(screening.of(Decision.REJECT).sum()), int(screening.of(Decision.REVIEW).sum())
    drawn, rejected = len(screening) + withheld, withheld + left
    text = "looked for text" if screening.text_was_read else f"too small for text (below {SMALLEST_SIDE} pixels)"
    text += (
        f"; a fault that the filters know, in {1 - 0.05 ** (1 / drawn):.2%} of what is drawn, would have been seen with probability 0.95"
    )
    text += f"; of honest images at most {WITHOUT_CAUSE:.2%}, here {WITHOUT_CAUSE * drawn:.1f}, are for a person without cause, text aside"
    outcome, reason = Outcome.PASS, f"{drawn} drawn, {withheld} withheld, none for a person; {text}"
    if review:
        outcome = Outcome.FLAG
        reason = f"a person must look at {review} of {len(screening)} images: {_listed(screening, Decision.REVIEW)}; {text}"
    if left:
        outcome, reason = (
            Outcome.FAIL,
            f"{left} images that the policy rejects are among the candidates: {_listed(screening, Decision.REJECT)}; {text}",
        )
    if rejected > policy.largest_rejected * drawn:
        outcome = Outcome.FAIL
        reason = f"{rejected} of {drawn} drawn images are rejected, the policy allows {policy.largest_rejected:.3g} of them"
        reason += f": {_listed(screening, Decision.REJECT)}; {text}" if left else f"; {text}"
    figures = {"withheld": float(withheld), "rejected": float(left), "for a person": float(review), "drawn": float(drawn)}
    figures |= {f"for a person, {ground}": float(number) for ground, number in screening.counts(Decision.REVIEW).items()}
    return _verdict(outcome, reason, rejected, drawn, policy, figures)


def _listed(screening: Screening, decision: Decision) -> str:
    return ", ".join(f"{ground} {number}" for ground, number in screening.counts(decision).items())


def _verdict(outcome: Outcome, reason: str, rejected: int, drawn: int, policy: ContentConfig, figures: dict[str, float]) -> Verdict:
    return Verdict(
        check="content",
        question=QUESTION,
        outcome=outcome,
        statistic_name="share of rejected images",
        statistic=rejected / drawn if drawn else 0.0,
        interval=clopper_pearson(rejected, drawn, 0.95),
        threshold=policy.largest_rejected,
        confidence_level=0.95,
        false_alarm_rate=float(stats.binom.sf(math.floor(policy.largest_rejected * drawn), drawn, WITHOUT_CAUSE)),
        reason=reason,
        limitation=LIMITATION,
        public=True,
        figures=figures,
    )
