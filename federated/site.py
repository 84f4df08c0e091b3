"""The guard: the only code that touches a hospital's patients for a federation. It runs under the hospital's user and answers messages.

Order of work for a round, from which nothing is left out and in which nothing changes places: signature, answers given before, policy,
order, budgets, secret key, charge in the ledger, training with the mechanism that the ledger holds, answer kept, settlement, key
destroyed. A message id is charged once. An answer is repeated byte by byte, so asking again buys nothing; a round that was cut off goes
on with its key, so that its noise is drawn once. No charge is ever given back.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from dpsynth.data.attributes import conditions_digest
from dpsynth.data.cohort import ImageSet
from dpsynth.data.split import Split
from dpsynth.errors import BudgetExceeded, DpsynthError, SelfCheckFailed
from dpsynth.model.moment_release import QUERIES
from dpsynth.privacy.accountant import epsilon_pld
from dpsynth.privacy.ledger import Charge, Ledger
from dpsynth.privacy.mechanism import Mechanism, MomentRelease, PoissonDpSgd, merged, to_json
from dpsynth.progress import Progress, silent
from dpsynth.train.run import private_images, usable_delta
from federated.journal import Journal, Message, Study
from federated.messages import (
    FIRST_TRAINING,
    UNREADABLE,
    Code,
    Facts,
    Refused,
    Request,
    Signed,
    decode_request,
    encode_refusal,
    encode_reply,
)
from federated.policy import SitePolicy, config_of, data_config, is_open, problem, site_ledger
from federated.rounds import Model, Proof, model_of, moments_round, require_bound, sgd_of, train_round

_LOG = logging.getLogger("dpsynth.site")


def local_time() -> datetime:
    """The hospital's clock."""
    return datetime.now().astimezone()


@dataclass
class Guard:
    """One hospital's guard. Make it with `open`; then call `handle` with each message."""

    policy: SitePolicy
    coordinators: tuple[Ed25519PublicKey, ...]
    ledger: Ledger
    journal: Journal
    clock: Callable[[], datetime] = local_time
    progress: Progress = field(default=silent)

    @classmethod
    def open(cls, policy: SitePolicy, *, clock: Callable[[], datetime] = local_time, progress: Progress = silent) -> Guard:
        """Raises what `site_ledger` raises, and whatever is wrong with keys. Touches no image."""
        ledger, keys, journal = site_ledger(policy), policy.coordinator_keys(), Journal(policy.state)
        journal.forget_answered()
        return cls(policy=policy, coordinators=keys, ledger=ledger, journal=journal, clock=clock, progress=progress)

    def note_ledger(self) -> None:
        """Called after each line that must not be forgotten."""
        self.journal.note_ledger(self.ledger)

    @property
    def images(self) -> ImageSet:
        """The data set of the ledger, read once: what changes on disk later is not trained on. Raises DataError, LedgerError and others."""
        return self._read[1]

    @cached_property
    def _read(self) -> tuple[int, ImageSet]:
        """The ledger's line that says which data these are, and the data."""
        line, config = self.ledger.data_line, data_config(self.policy)
        images = private_images(config, self.ledger, self.progress)
        usable_delta(config, images, self.ledger)
        return line, images

    def handle(self, raw: bytes) -> bytes:
        """The answer to one message. Never raises: what goes wrong is one of the codes, and its text stays in the guard's log."""
        digest = UNREADABLE
        try:
            signed = decode_request(raw, coordinators=self.coordinators, largest_bytes=self.policy.largest_message_bytes)
            digest = signed.digest
            if signed.request.site != self.policy.site:
                raise Refused(Code.RECIPIENT)
            with self.journal.alone():
                return self._answer(signed)
        except Refused as refused:
            _LOG.warning("refused: %s", refused)
            return encode_refusal(refused.code, request_sha256=digest)
        except DpsynthError as error:
            _LOG.error("failed; the coordinator is told no more than that: %s", error)
            return encode_refusal(Code.FAILED, request_sha256=digest)
        except Exception:
            _LOG.exception("failed; the coordinator is told no more than that")
            return encode_refusal(Code.FAILED, request_sha256=digest)

    def _answer(self, signed: Signed) -> bytes:
        request = signed.request
        site_ledger(self.policy)  # another file may lie there since the guard was started
        booked = bool(self._charges(request.study))
        study = self.journal.study(request.study, plan_sha256=request.plan.digest, key=signed.key, booked=booked, limit=self.policy.studies)
        if request.kind == "join":  # costs nothing, so nothing of it is kept: whoever repeats it sees the ledger's epsilon of now
            self._require_policy(request)
            if not booked:
                self._require_affordable(request, self._model(request))
            return encode_reply(request_sha256=signed.digest, facts=self._facts(request), arrays={})
        message = study.message(request.message_id)
        if message.digest() not in (None, signed.digest):
            raise Refused(Code.MESSAGE_REUSED)
        given = message.reply()
        if given is None:
            given = self._first_answer(signed, study, message)
        self._settle(request)
        message.forget()  # also after an answer whose keeping was cut off
        return given

    def _first_answer(self, signed: Signed, study: Study, message: Message) -> bytes:
        """The answer to a message that has none yet, kept before it leaves."""
        request = signed.request
        try:
            arrays = self._round(signed, study, message)
            reply = encode_reply(request_sha256=signed.digest, facts=self._facts(request), arrays=arrays)
        except (Refused, BudgetExceeded, SelfCheckFailed) as error:
            charge = self._charge(request)
            failed = Code.FAILED if charge is None else Code.LOST  # the same message can succeed, or no more
            code = error.code if isinstance(error, Refused) else Code.BUDGET if isinstance(error, BudgetExceeded) else failed
            _LOG.warning("%s round %d: %s", request.study, request.round, error)
            reply = encode_refusal(code, request_sha256=signed.digest)
            # Kept in place of a closed charge's answer, which is gone, a refusal would say that none ever left.
            if charge.settled if charge is not None else code is Code.FAILED or study.is_full():
                message.forget()
                return reply
        message.answer(signed.digest, reply)
        return reply

    def _round(self, signed: Signed, study: Study, message: Message) -> dict[str, Any]:
        """Book the round, or find its booking after a crash, and compute it with what was booked."""
        request, charge = signed.request, self._charge(signed.request)
        model = self._model(request) if charge is not None else self._allowed(request)
        # All that can fail for the coordinator's sake fails here, before the charge.
        denoiser = model.with_weights(signed.arrays) if request.kind == "train" else None
        told = model.told(signed.arrays, QUERIES[request.round]) if request.kind == "moments" else None
        split = self._split(request.study, study)
        if charge is None:
            charge = self._book(signed, message, self._mechanism(request, model), coins=split.commitment)
        elif charge.settled or charge.config_sha256 != self._booked_digest(signed.digest) or message.key() is None:
            raise Refused(Code.LOST)
        else:
            coins = charge.coins_sha256
            self.ledger.resume(charge.reservation, charge.mechanisms, config_sha256=charge.config_sha256, coins_sha256=coins)
        self.note_ledger()
        study.forget_others(message)
        (mechanism,), stream = charge.mechanisms, message.stream()  # from here on, what the ledger booked and nothing else

        def record(found: Proof) -> None:
            message.note_proof(found.to_json())

        if told is not None and isinstance(mechanism, MomentRelease):
            return moments_round(model, split, told, mechanism=mechanism, stream=stream, record=record)
        if denoiser is None or not isinstance(mechanism, PoissonDpSgd):
            raise Refused(Code.LOST)
        return train_round(
            denoiser,
            model,
            split,
            mechanism=mechanism,
            stream=stream,
            checkpoint=message.checkpoint,
            binding=charge.reservation,
            proved=require_bound(self._config_json(request), mechanism),
            record=record,
            callback=lambda step: self.progress(f"{request.study} round {request.round}", step, mechanism.steps),
        )

    def _split(self, name: str, study: Study) -> Split:
        """The study's split. Raises Refused(LOST) when its coins are not those that the ledger noted with the study's first round, or when
        the data changed since. A guard that holds the images of before can book nothing.
        """
        (line, images), charges = self._read, self._charges(name)
        if any(charge.line < line for _, charge in charges):
            raise Refused(Code.LOST, "the data changed since the study began; it ends here")
        split = study.split(images, self.policy.data, cells=self._cells(), booked=bool(charges))
        if any(charge.coins_sha256 != split.commitment for _, charge in charges):
            raise Refused(Code.LOST)
        return split

    def _allowed(self, request: Request) -> Model:
        """The model of a round that the policy allows and whose turn it is. Raises Refused."""
        self._require_policy(request)
        if request.round <= max((number for number, _ in self._charges(request.study)), default=-1):
            raise Refused(Code.ORDER)
        model = self._model(request)
        self._require_affordable(request, model)
        return model

    def _require_affordable(self, request: Request, model: Model) -> None:
        """Raise Refused unless the site could be charged for this round and all that the plan has after it: patients pay for no study that
        cannot end.
        """
        spent = [m for _, charge in self._charges(request.study) for m in charge.mechanisms]
        coming = self._coming(request, model)
        if (epsilon := epsilon_pld([*spent, *coming], self.policy.delta)) > self.policy.study_epsilon:
            raise Refused(
                Code.STUDY_BUDGET, f"the whole study would cost epsilon {epsilon:.4g}, study_epsilon is {self.policy.study_epsilon:g}"
            )
        try:
            self.ledger.require_affordable(coming)
        except BudgetExceeded as error:
            raise Refused(Code.BUDGET, str(error)) from error

    def _coming(self, request: Request, model: Model) -> tuple[Mechanism, ...]:
        """What is booked for this round and for each after it: the plan's numbers, the site's own declared number of patients, clip norms
        of the public constants.
        """
        plan, number = request.plan, request.round
        release, left = model.release(plan), plan.rounds - max(number - FIRST_TRAINING, 0)
        moments = [release.alone(query) for query in QUERIES[number:]]
        if not left:
            return tuple(moments)
        sgd = sgd_of(plan, steps=plan.steps_per_round, declared_patients=self.policy.data.declared_patients)
        return (*moments, *[sgd] * left)

    def _require_policy(self, request: Request) -> None:
        if not is_open(self.policy, self.clock()):
            raise Refused(Code.HOURS)
        code = problem(self.policy, request.plan)
        if code is None and request.round >= FIRST_TRAINING + request.plan.rounds:
            code = Code.STEPS
        if code is not None:
            raise Refused(code)

    def _mechanism(self, request: Request, model: Model) -> Mechanism:
        """What is to be booked, its bound proved."""
        mechanism = self._coming(request, model)[0]
        if isinstance(mechanism, PoissonDpSgd):
            require_bound(self._config_json(request), mechanism)
        return mechanism

    def _book(self, signed: Signed, message: Message, mechanism: Mechanism, *, coins: str) -> Charge:
        """Charge the round in full, and note the patients' coins, before any image is used for it. Raises BudgetExceeded when a local run
        took the rest of the budget just now.
        """
        request = signed.request
        message.begin(signed.digest)
        reservation = self.ledger.reserve(
            (mechanism,),
            purpose=f"federation {request.study}, round {request.round}",
            run_id=_run_id(request),
            config_sha256=self._booked_digest(signed.digest),
            coins_sha256=coins,
            data_line=self._read[0],
        )
        return self.ledger.charge(reservation)

    def _settle(self, request: Request) -> None:
        """Close the charge of a round whose answer is kept: in full, whatever the answer was."""
        charge = self._charge(request)
        if charge is not None and not charge.settled:
            self.ledger.settle(charge.reservation, mechanisms=charge.mechanisms)

    def _charge(self, request: Request) -> Charge | None:
        return next((charge for charge in self.ledger.charges() if charge.run_id == _run_id(request)), None)

    def _charges(self, study: str) -> list[tuple[int, Charge]]:
        return charges_of(self.ledger, study)

    def _facts(self, request: Request) -> Facts:
        """Public numbers that go with an answer."""
        spent = self.ledger.spent()
        charged = merged([m for _, charge in self._charges(request.study) for m in charge.mechanisms])
        return Facts.model_validate(
            {
                "unit": self.policy.data.unit.value,
                "declared_patients": self.policy.data.declared_patients,
                "max_images_per_patient": self.policy.data.max_images_per_patient,
                "delta": self.policy.delta,
                "charged": tuple(to_json(mechanism) for mechanism in charged),
                "ledger_epsilon": spent if math.isfinite(spent) else "inf",
            }
        )

    def _booked_digest(self, request_sha256: str) -> str:
        """Digest of the request and of what each image is trained as, so that a round can only go on with what it began with."""
        return hashlib.sha256((request_sha256 + self._cells()).encode()).hexdigest()

    def _cells(self) -> str:
        return conditions_digest(self.images, self.policy.data, salt=self.ledger.digest_salt)

    def _model(self, request: Request) -> Model:
        return model_of(self._config_json(request))

    def _config_json(self, request: Request) -> str:
        return config_of(self.policy, request.plan).model_dump_json()


def charges_of(ledger: Ledger, study: str) -> list[tuple[int, Charge]]:
    """Number and charge of every round of a study, by the ledger alone."""
    parts = [(charge.run_id.split("/"), charge) for charge in ledger.charges()]
    return [(int(names[1]), charge) for names, charge in parts if len(names) == 3 and names[0] == study]


def _run_id(request: Request) -> str:
    return f"{request.study}/{request.round}/{request.message_id}"
