"""The ledger: what it charges, what it refuses, and that every tampering is named."""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest

from dpsynth.errors import BudgetExceeded, LedgerError, LedgerTampered, StorageError
from dpsynth.privacy.accountant import epsilon_pld
from dpsynth.privacy.ledger import Ledger
from dpsynth.privacy.mechanism import GaussianQuery, Mechanism, MomentRelease, NonPrivate, PoissonDpSgd, to_json
from dpsynth.privacy.unit import PrivacyUnit

SMALL = MomentRelease(noise_multiplier=20.0, queries=(GaussianQuery(name="a", share=1.0, clip_norm=1.0),))
SGD = PoissonDpSgd(noise_multiplier=2.0, clip_norm=1.0, sampling_probability=0.1, steps=50, declared_patients=100)
RUN = (SMALL, SGD)


def open_ledger(path: Path, epsilon: float = 3.0) -> Ledger:
    return Ledger.open_new(
        path,
        data_name="x",
        unit=PrivacyUnit.PATIENT,
        epsilon=epsilon,
        delta=1e-5,
        max_gate_attempts=2,
        data_digest="d",
        digest_salt="00",
    )


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return open_ledger(tmp_path / "data.ledger.jsonl")


def spoil(ledger: Ledger, content: bytes) -> list[str]:
    ledger.path.write_bytes(content)
    return Ledger.problems_of(ledger.path)


def test_a_reservation_is_charged_in_full_and_a_settlement_lowers_it(ledger: Ledger) -> None:
    reservation = ledger.reserve(RUN, purpose="train", run_id="r")
    assert ledger.spent() == pytest.approx(epsilon_pld(RUN, 1e-5))
    done = (SMALL, replace(SGD, steps=10))
    ledger.settle(reservation, mechanisms=done)
    assert ledger.spent() == pytest.approx(epsilon_pld(done, 1e-5))
    assert Ledger.problems_of(ledger.path) == []


def test_reserve_refuses_what_exceeds_the_budget(ledger: Ledger) -> None:
    ledger.reserve(RUN, purpose="train", run_id="1")
    before = ledger.path.read_bytes()
    too_much = (SMALL, replace(SGD, steps=500))
    with pytest.raises(BudgetExceeded, match=r"budget.*spent"):
        ledger.reserve(too_much, purpose="train", run_id="2")
    with pytest.raises(BudgetExceeded, match=r"budget.*spent"):
        ledger.require_affordable(too_much)
    ledger.require_affordable((SMALL,))
    assert ledger.path.read_bytes() == before
    assert ledger.spent() <= ledger.budget_epsilon


def test_a_budget_is_kept_to_the_last_digit(tmp_path: Path) -> None:
    spent = epsilon_pld(RUN, 1e-5)
    for budget, fits in ((spent * (1 + 1e-6), True), (spent * (1 - 1e-6), False)):
        ledger = open_ledger(tmp_path / f"{fits}.ledger.jsonl", epsilon=budget)
        with nullcontext() if fits else pytest.raises(BudgetExceeded):
            ledger.reserve(RUN, purpose="train", run_id="1")


def test_runs_compose_as_mechanisms_not_as_epsilons(ledger: Ledger) -> None:
    for run_id in ("1", "2"):
        ledger.reserve((SGD,), purpose="train", run_id=run_id)
    one = epsilon_pld([SGD], 1e-5)
    assert one < ledger.spent() < 2 * one
    assert ledger.spent() == pytest.approx(epsilon_pld([SGD, SGD], 1e-5))


@pytest.mark.parametrize(
    "settled",
    [
        (SGD,),
        (SMALL, replace(SGD, steps=51)),
        (SMALL, replace(SGD, noise_multiplier=2.1)),
        (replace(SMALL, noise_multiplier=30.0), SGD),
        (SMALL, replace(SGD, sampling_probability=0.05, steps=10)),
        (SMALL, SGD, SGD),
        (NonPrivate(reason="x"), SGD),
    ],
)
def test_a_settlement_may_only_drop_steps(ledger: Ledger, settled: tuple[Mechanism, ...]) -> None:
    reservation = ledger.reserve(RUN, purpose="train", run_id="r")
    with pytest.raises(LedgerError, match="lower the steps"):
        ledger.settle(reservation, mechanisms=settled)
    assert ledger.spent() == pytest.approx(epsilon_pld(RUN, 1e-5))


def test_a_reservation_is_resumed_only_as_it_was_and_settled_only_once(ledger: Ledger) -> None:
    reservation = ledger.reserve(RUN, purpose="train", run_id="r")
    ledger.resume(reservation, RUN)
    with pytest.raises(LedgerError, match="differ"):
        ledger.resume(reservation, (SMALL, replace(SGD, steps=60)))
    with pytest.raises(LedgerError, match="differ"):
        ledger.resume(reservation, RUN, config_sha256="of another configuration")
    with pytest.raises(LedgerError, match="differ"):
        ledger.resume(reservation, RUN, coins_sha256="of other coins")
    ledger.settle(reservation, mechanisms=RUN)
    for again in (lambda: ledger.settle(reservation, mechanisms=RUN), lambda: ledger.resume(reservation, RUN)):
        with pytest.raises(LedgerError, match="open reservation"):
            again()


def test_gate_attempts_are_counted_per_generator(ledger: Ledger) -> None:
    with pytest.raises(LedgerError, match="not booked"):
        ledger.record_gate_attempt("r")
    for run_id in ("r", "s"):
        ledger.reserve((SMALL,), purpose="train", run_id=run_id)
    assert [ledger.record_gate_attempt("r"), ledger.record_gate_attempt("r"), ledger.record_gate_attempt("s")] == [1, 2, 1]
    with pytest.raises(BudgetExceeded, match="checked 2 times"):
        ledger.record_gate_attempt("r")


def test_a_budget_is_never_rewritten(ledger: Ledger) -> None:
    with pytest.raises(LedgerError, match="exists already"):
        open_ledger(ledger.path, epsilon=100.0)
    assert ledger.budget_epsilon == 3.0


@pytest.mark.parametrize("epsilon", [0.0, -1.0, math.nan])
def test_a_meaningless_budget_is_refused(tmp_path: Path, epsilon: float) -> None:
    with pytest.raises(LedgerError, match="above 0"):
        open_ledger(tmp_path / "new", epsilon)
    assert not (tmp_path / "new").exists()


def test_a_non_private_run_needs_an_infinite_budget(ledger: Ledger, tmp_path: Path) -> None:
    with pytest.raises(BudgetExceeded):
        ledger.reserve((NonPrivate(reason="x"),), purpose="train", run_id="r")
    research = open_ledger(tmp_path / "research", math.inf)
    research.reserve((NonPrivate(reason="x"),), purpose="train", run_id="r")
    assert research.spent() == math.inf
    assert research.summary()["spent"] == "inf"


def test_other_data_are_refused(ledger: Ledger) -> None:
    ledger.require_data("d")
    with pytest.raises(LedgerError, match=r"other data.*data-changed.*a new ledger would forget"):
        ledger.require_data("e")


def test_data_that_changed_keep_all_charges_and_end_what_was_booked_before(ledger: Ledger) -> None:
    reservation = ledger.reserve((SMALL,), purpose="train", run_id="1", config_sha256="c")
    before, line = ledger.charges(), ledger.data_line
    ledger.change_data("e", who="Dr B", why="two patients withdrew")
    ledger.require_data("e")
    with pytest.raises(LedgerError, match="other data"):
        ledger.require_data("d")
    assert (ledger.charges(), Ledger.problems_of(ledger.path)) == (before, [])
    assert ledger.summary()["data_changes"][0]["words"] == {"Dr B": "two patients withdrew"}
    with pytest.raises(LedgerError, match="booked in line 2, before the data changed in line 3"):
        ledger.resume(reservation, (SMALL,), config_sha256="c")
    with pytest.raises(LedgerError, match="before the data changed in line 3"):
        ledger.record_gate_attempt("1")
    with pytest.raises(LedgerError, match="changed after they were read"):
        ledger.reserve((SMALL,), purpose="train", run_id="2", data_line=line)
    ledger.settle(reservation, mechanisms=(SMALL,))
    ledger.reserve((SMALL,), purpose="train", run_id="2", data_line=ledger.data_line)
    assert ledger.record_gate_attempt("2") == 1
    assert ledger.spent() == pytest.approx(epsilon_pld((SMALL, SMALL), 1e-5))
    with pytest.raises(LedgerError, match="nothing to note"):
        ledger.change_data("e", who="Dr B", why="again")


def test_a_change_of_data_after_a_torn_line_leaves_a_sound_ledger(ledger: Ledger) -> None:
    ledger.path.write_bytes(ledger.path.read_bytes() + b'{"seq": 2, "ty')
    ledger.change_data("e", who="Dr B", why="withdrew")
    assert Ledger.problems_of(ledger.path) == []
    ledger.require_data("e")


def test_digests_of_later_lines_do_not_tell_why_the_data_changed(tmp_path: Path) -> None:
    """They leave with releases; without a salt anybody could try words against them."""
    lines = []
    for name in ("one", "two"):
        ledger = open_ledger(tmp_path / name)
        ledger.change_data("e", who="Dr B", why="two patients withdrew")
        lines.append(json.loads(ledger.path.read_text().splitlines()[-1]))
    assert len({line["salt"] for line in lines}) == 2
    assert min(len(line["salt"]) for line in lines) >= 32


# -- tampering ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def used(ledger: Ledger) -> Ledger:
    reservation = ledger.reserve((SMALL,), purpose="train", run_id="1")
    ledger.settle(reservation, mechanisms=(SMALL,))
    ledger.reserve((SMALL,), purpose="train", run_id="2")
    return ledger


def test_every_flipped_bit_is_found(used: Ledger) -> None:
    content = used.path.read_bytes()
    for position in range(len(content)):
        flipped = bytearray(content)
        flipped[position] ^= 1 << (position % 7)
        problems = spoil(used, bytes(flipped))
        assert problems, f"byte {position} of {content[max(0, position - 20) : position + 5]!r}"
        assert "line" in problems[0]


def test_every_cut_is_found_and_no_charge_is_lost(used: Ledger) -> None:
    content = used.path.read_bytes()
    for length in range(len(content)):
        assert spoil(used, content[:length]), f"cut at {length}"


def test_removed_swapped_and_doubled_lines_are_named(used: Ledger) -> None:
    lines = used.path.read_bytes().splitlines(keepends=True)
    for changed in ([lines[0], *lines[2:]], [lines[0], lines[2], lines[1], lines[3]], [*lines, lines[-1]], lines[1:], []):
        assert spoil(used, b"".join(changed))


def test_a_larger_budget_with_a_recomputed_chain_is_found_by_the_head(used: Ledger) -> None:
    previous, forged = "0" * 64, []
    for raw in used.path.read_bytes().splitlines():
        entry = json.loads(raw)
        entry["previous"] = previous
        if entry["type"] == "genesis":
            entry["epsilon"] = 1000.0
        line = json.dumps(entry, sort_keys=True, separators=(",", ":")).encode()
        previous = hashlib.sha256(line).hexdigest()
        forged.append(line)
    assert any("head" in problem for problem in spoil(used, b"\n".join(forged) + b"\n"))


def test_a_missing_or_foreign_head_is_named(used: Ledger) -> None:
    head = used.path.with_name(used.path.name + ".head")
    for content in (b"", b"{}", b'{"lines": 99, "sha256": "x"}', b'{"lines": 2, "sha256": "x"}'):
        head.write_bytes(content)
        assert Ledger.problems_of(used.path)
    head.unlink()
    assert "head" in Ledger.problems_of(used.path)[0]


def forged_line(ledger: Ledger, **fields: object) -> bytes:
    """A line that continues the chain, as anyone who can write the file can make it."""
    lines = ledger.path.read_bytes().splitlines()
    entry = {"seq": len(lines) + 1, "previous": hashlib.sha256(lines[-1]).hexdigest(), "time": time.time(), **fields}
    return json.dumps(entry, sort_keys=True, separators=(",", ":")).encode() + b"\n"


def test_a_forged_settlement_behind_the_head_is_named(ledger: Ledger) -> None:
    reservation = ledger.reserve((SGD,), purpose="train", run_id="r")
    mechanisms = [to_json(replace(SGD, steps=0))]
    line = forged_line(ledger, type="settle", reservation=reservation, mechanisms=mechanisms)
    assert any("behind the head" in problem for problem in spoil(ledger, ledger.path.read_bytes() + line))


def test_a_ledger_cut_back_to_its_budget_is_named_even_without_a_head(used: Ledger) -> None:
    first = used.path.read_bytes().splitlines(keepends=True)[0]
    used.path.with_name(used.path.name + ".head").unlink()
    assert any("head" in problem for problem in spoil(used, first))


def test_a_removed_ledger_cannot_be_opened_anew(used: Ledger) -> None:
    used.path.unlink()
    with pytest.raises(LedgerError, match="is gone"):
        open_ledger(used.path, epsilon=100.0)
    assert not used.path.exists()


@pytest.mark.parametrize("content", [None, b"{}"], ids=["gone", "damaged"])
def test_the_head_that_is_left_refuses_an_older_ledger_and_takes_the_newest(used: Ledger, content: bytes | None) -> None:
    """What docs/site.md tells an officer to do, and what the error says: nothing that would forget a charge."""
    older = used.path.read_bytes()
    used.reserve((SMALL,), purpose="train", run_id="3")
    newest = used.path.read_bytes()
    used.path.unlink() if content is None else used.path.write_bytes(content)
    with pytest.raises((LedgerError, LedgerTampered), match=r"head file|Keep both") as said:
        Ledger.load(used.path)
    assert "estore it" not in str(said.value)
    used.path.write_bytes(older)
    with pytest.raises(LedgerTampered, match="older copy put back would forget"):
        Ledger.load(used.path)
    used.path.write_bytes(newest)
    assert [charge.run_id for charge in Ledger.load(used.path).charges()][-1] == "3"


def test_an_older_copy_of_ledger_and_head_does_not_match_a_release(used: Ledger) -> None:
    files = (used.path, used.path.with_name(used.path.name + ".head"))
    older = [path.read_bytes() for path in files]
    used.reserve((SMALL,), purpose="train", run_id="3")
    anchor = used.head()
    assert Ledger.problems_of(used.path, anchor=anchor) == []
    for path, content in zip(files, older, strict=True):
        path.write_bytes(content)
    assert Ledger.problems_of(used.path) == []
    assert "older" in Ledger.problems_of(used.path, anchor=anchor)[0]


def test_another_name_for_the_file_leads_to_the_same_lock(used: Ledger, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "alias").symlink_to(used.path)
    assert Ledger.load(tmp_path / "mine" / "alias").path == used.path.resolve()


def test_a_line_is_on_the_disk_before_it_is_granted(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    synced, real = [], os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda descriptor: (synced.append(str(Path(f"/proc/self/fd/{descriptor}").readlink())), real(descriptor))
    )
    ledger.reserve((SMALL,), purpose="train", run_id="r")
    assert {str(ledger.path), str(ledger.path.parent)} <= set(synced)


def test_a_tampered_ledger_reserves_nothing(used: Ledger) -> None:
    used.path.write_bytes(used.path.read_bytes().replace(b'"run_id":"1"', b'"run_id":"9"'))
    with pytest.raises(LedgerTampered, match="line"):
        used.reserve((SMALL,), purpose="train", run_id="3")


def test_an_unknown_kind_of_line_or_mechanism_is_refused(used: Ledger) -> None:
    used._append("bribe", {}, lines=used._sound())
    assert "bribe" in Ledger.problems_of(used.path)[0]


def test_charges_above_the_budget_are_named_by_verify(ledger: Ledger) -> None:
    fields = {
        "reservation": "f",
        "purpose": "x",
        "run_id": "x",
        "config_sha256": "",
        "mechanisms": [to_json(replace(SMALL, noise_multiplier=0.1))],
    }
    ledger._append("reserve", fields, lines=ledger._sound())
    assert "above the budget" in Ledger.problems_of(ledger.path)[0]


# -- crashes -----------------------------------------------------------------------------------------------------------


def test_a_torn_line_is_closed_and_no_byte_removed(used: Ledger) -> None:
    whole = used.path.read_bytes()
    with used.path.open("ab") as file:
        file.write(b'{"seq":5,"type":"reserve","prev')
    spent = used.spent()
    used.reserve((SMALL,), purpose="train", run_id="3")
    assert used.path.read_bytes().startswith(whole + b'{"seq":5,"type":"reserve","prev\n')
    assert used.spent() > spent
    assert Ledger.problems_of(used.path) == []


def test_a_crash_between_line_and_head_is_rolled_forward(used: Ledger) -> None:
    head = used.path.with_name(used.path.name + ".head")
    before = used.spent()
    with pytest.MonkeyPatch.context() as patch:
        real = Ledger._write_head
        patch.setattr(Ledger, "_write_head", lambda self, lines, coming=None: real(self, lines, coming=coming) if coming else None)
        used.reserve((SMALL,), purpose="train", run_id="3")
    spent = used.spent()
    assert spent > before
    used.record_gate_attempt("3")
    assert Ledger.problems_of(used.path) == []
    assert json.loads(head.read_bytes())["lines"] == len(used.path.read_bytes().splitlines())


def test_a_clock_that_goes_back_is_noted_and_harmless(used: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", lambda: 1000.0)
    used.reserve((SMALL,), purpose="train", run_id="3")
    last = json.loads(used.path.read_bytes().splitlines()[-1])
    assert last["clock_went_back"] is True
    assert last["time"] > 1e9
    assert Ledger.problems_of(used.path) == []


CHILD = """
import sys
from pathlib import Path
from dpsynth.privacy.ledger import Ledger
from dpsynth.privacy.mechanism import GaussianQuery, MomentRelease
from dpsynth.errors import BudgetExceeded
small = MomentRelease(noise_multiplier=float(sys.argv[2]), queries=(GaussianQuery(name="a", share=1.0, clip_norm=1.0),))
ledger = Ledger.load(Path(sys.argv[1]))
print("ready", flush=True)
try:
    for number in range(int(sys.argv[3])):
        print(ledger.reserve((small,), purpose="train", run_id=str(number)), flush=True)
except BudgetExceeded:
    pass
"""


def child(path: Path, noise: float, count: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", CHILD, str(path), str(noise), str(count)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_processes_that_reserve_at_once_never_overspend(tmp_path: Path) -> None:
    ledger = open_ledger(tmp_path / "l", epsilon=1.0)
    children = [child(ledger.path, 8.0, 20) for _ in range(3)]
    granted = [line for process in children for line in process.communicate(timeout=120)[0].split() if line != "ready"]
    charges = ledger.charges()
    assert sorted(granted) == sorted(charge.reservation for charge in charges)
    assert 2 < len(charges) < 60
    assert ledger.spent() <= 1.0
    assert Ledger.problems_of(ledger.path) == []


def test_a_killed_process_loses_no_reservation(tmp_path: Path) -> None:
    ledger, random_time = open_ledger(tmp_path / "l", epsilon=50.0), random.Random(7)
    printed: set[str] = set()
    for _ in range(5):
        process = child(ledger.path, 50.0, 1000)
        assert process.stdout is not None
        printed |= {process.stdout.readline().strip() for _ in range(3)}  # "ready" and two reservations
        time.sleep(random_time.uniform(0.0, 0.3))
        process.send_signal(signal.SIGKILL)
        printed |= set(process.communicate(timeout=60)[0].split())
    charged = {charge.reservation for charge in ledger.charges()}
    complete = {name for name in printed if len(name) == 16}
    assert len(complete) >= 10
    assert complete <= charged
    ledger.reserve((SMALL,), purpose="after", run_id="after")
    assert Ledger.problems_of(ledger.path) == []


def test_a_full_disk_charges_nothing_and_leaves_a_sound_ledger(tmp_path: Path) -> None:
    """The limit on a file's size stands in for a full disk: a write ends in the middle of a line."""
    ledger = open_ledger(tmp_path / "l")
    ledger.reserve((SMALL,), purpose="train", run_id="0")
    size = ledger.path.stat().st_size
    code = (
        "import resource, signal\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({size + 100}, {size + 100}))\n"
    )
    process = subprocess.run(
        [sys.executable, "-c", code + CHILD, str(ledger.path), "20", "5"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert process.returncode != 0
    assert "StorageError" in process.stderr
    assert process.stdout.split() == ["ready"]
    assert len(ledger.charges()) == 1
    ledger.reserve((SMALL,), purpose="train", run_id="1")
    assert len(ledger.charges()) == 2
    assert Ledger.problems_of(ledger.path) == []


def _reserve_often(ledger: Ledger, times: int) -> None:
    for number in range(times):
        ledger.reserve((SMALL,), purpose="train", run_id=str(number))


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_full_file_system_is_reported_in_one_line(tmp_path: Path) -> None:
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(tmp_path)], capture_output=True, check=False)
    if mount.returncode != 0:
        pytest.skip("mounting is not permitted here")
    try:
        ledger = open_ledger(tmp_path / "l", epsilon=50.0)
        with pytest.raises(StorageError, match="Free some space"):
            _reserve_often(ledger, 1000)
        spent = ledger.spent()
        assert spent > 0
        assert Ledger.problems_of(ledger.path) == []
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)
