"""What may be claimed, in numbers and in one sentence."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dpsynth.errors import ArtifactError, ClaimRefused, LedgerError
from dpsynth.privacy.accountant import Accounting, epsilon_pld, epsilon_rdp, tpr_at_fpr
from dpsynth.privacy.calibrate import delta_limit
from dpsynth.privacy.mechanism import Mechanism, from_json, to_json
from dpsynth.privacy.unit import NEIGHBORING_RELATION, PrivacyUnit

_FPR = 0.01


@dataclass(frozen=True, kw_only=True)
class Guarantee:
    """The claim of one run. `ledger_epsilon` covers everything ever charged to the data set, this run included."""

    data_name: str
    unit: PrivacyUnit
    declared_patients: int
    mechanisms: tuple[Mechanism, ...]
    accounting: Accounting
    ledger_epsilon: float
    max_images_per_patient: int
    unprotected: tuple[str, ...]

    @property
    def epsilon(self) -> float:
        """The claimed epsilon of this run (PLD)."""
        return self.accounting.pld

    @property
    def delta(self) -> float:
        """The delta of the claim."""
        return self.accounting.delta

    @property
    def neighboring_relation(self) -> str:
        """How neighbouring data sets differ."""
        return NEIGHBORING_RELATION

    def attack_rate(self, fpr: float) -> float:
        """Greatest true positive rate of a membership test with false positive rate `fpr`."""
        return float(tpr_at_fpr(self.mechanisms, (fpr,))[0])

    def sentence(self) -> str:
        """One sentence a doctor understands."""
        if not math.isfinite(self.epsilon):
            return "There is no privacy guarantee (epsilon is infinite): these images may show patients and must not leave the hospital."
        patient = self.unit is PrivacyUnit.PATIENT
        whom = "a patient, with all of their images," if patient else "one single image"
        what = (
            f"Whoever has the synthetic images and tries to tell whether {whom} was in the training data can do no better than this: "
            f"a test that wrongly accuses 1 in 100 of those who were not finds at most {round_up(100 * self.attack_rate(_FPR)):.0f} in 100 "
            f"of those who were (epsilon {round_up(self.epsilon, 2):.2f}, delta {self.delta:.2g}, {self.unit.value} level)"
        )
        if not patient:
            what += "; this protects single images, so a patient with several images is protected less"
        return what + "."

    def problems(self) -> tuple[str, ...]:
        """Why the claim does not stand when recomputed from its mechanisms; empty when it does."""
        found = list(self.accounting.problems())
        limit = delta_limit(self.declared_patients)
        if self.delta > limit * (1 + 1e-12):
            found.append(f"delta {self.delta:.3g} is larger than {limit:.3g}, the limit for {self.declared_patients} patients")
        pld, rdp = epsilon_pld(self.mechanisms, self.delta), epsilon_rdp(self.mechanisms, self.delta)
        for name, stated, computed in (("PLD", self.accounting.pld, pld), ("RDP", self.accounting.rdp, rdp)):
            if not (stated == computed or abs(stated - computed) <= 1e-3 * max(computed, 1e-3)):
                found.append(f"the stated {name} epsilon {stated:.4g} is not the {computed:.4g} of its mechanisms")
        if not self.ledger_epsilon >= self.epsilon * (1 - 1e-6):
            found.append(f"the ledger counts epsilon {self.ledger_epsilon:.4g} over all runs, less than this run's {self.epsilon:.4g}")
        return tuple(found)

    def to_json(self) -> dict[str, Any]:
        """Plain values for files that may leave."""
        return {
            "data_name": self.data_name,
            "unit": self.unit.value,
            "neighboring_relation": self.neighboring_relation,
            "declared_patients": self.declared_patients,
            "mechanisms": [to_json(mechanism) for mechanism in self.mechanisms],
            "accounting": self.accounting.to_json(),
            "ledger_epsilon": "inf" if self.ledger_epsilon == math.inf else self.ledger_epsilon,
            "max_images_per_patient": self.max_images_per_patient,
            "unprotected": list(self.unprotected),
            "sentence": self.sentence(),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Guarantee:
        """Inverse of `to_json`. Raises ArtifactError when fields are missing or wrong."""
        try:
            if value["neighboring_relation"] != NEIGHBORING_RELATION:
                raise ValueError(f"neighboring relation {value['neighboring_relation']!r}")
            return cls(
                data_name=str(value["data_name"]),
                unit=PrivacyUnit(value["unit"]),
                declared_patients=int(value["declared_patients"]),
                mechanisms=tuple(from_json(item) for item in value["mechanisms"]),
                accounting=Accounting.from_json(value["accounting"]),
                ledger_epsilon=float(value["ledger_epsilon"]),
                max_images_per_patient=int(value["max_images_per_patient"]),
                unprotected=tuple(str(item) for item in value["unprotected"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError, LedgerError) as error:
            raise ArtifactError(f"Expected a guarantee, found something else: {error}.") from error


def round_up(value: float, digits: int = 0) -> float:
    """Round an upper bound to `digits` decimals without making it smaller; a part in a billion is taken for float error."""
    scale = 10.0**digits
    return math.ceil(value * scale - 1e-9) / scale


def claim(guarantee: Guarantee) -> Guarantee:
    """The guarantee, if the accountants agree and it follows from its mechanisms, or says plainly that there is none.

    A non-private run may be described (epsilon infinite), never released. Raises ClaimRefused with every reason.
    """
    if guarantee.epsilon == math.inf:
        return guarantee
    problems = guarantee.problems()
    if problems:
        raise ClaimRefused("No epsilon is claimed: " + "; ".join(problems) + ".")
    return guarantee
