"""The hospital's command, `dpsynth-site`: from `init` to the officer's `sign`. Errors are one line."""

from __future__ import annotations

import json
import logging
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dpsynth.cli import CHANGED_BECAUSE, Format, OutputFormat, new_app, parse_because, parse_reviews, progress_bars, run_app
from dpsynth.errors import RefusedError

if TYPE_CHECKING:
    from dpsynth.release.statement import SiteStatement

app = new_app(
    "dpsynth-site",
    "The hospital's guard in a federation: it owns data, policy and ledger, and refuses what they do not allow, whoever asks.",
)
PolicyFile = Annotated[Path, typer.Argument(metavar="POLICY", help="The site's policy; docs/site.md lists every setting.")]
CandidatesFile = Annotated[
    Path, typer.Argument(metavar="CANDIDATES", help="What the coordinator sent, as `dpsynth-federation candidates` writes it.")
]
KeyOption = Annotated[
    Path | None,
    typer.Option("--key", metavar="FILE", help="The site's private signing key; without it `dpsynth-site sign` signs, on another machine."),
]
OutOption = Annotated[Path, typer.Option("--out", metavar="FILE", help="Where to write the statement.")]


@app.callback()
def options() -> None:
    """Options before the verb."""


@app.command()
def init(
    policy: PolicyFile,
    max_gate_attempts: Annotated[
        int,
        typer.Option(
            "--max-gate-attempts", help="How often images of one generator may be checked, of the site's own runs and of studies."
        ),
    ] = 3,
) -> None:
    """Read the data set once and open its ledger with the policy's epsilon and delta. A ledger that is there stays as it is."""
    from federated.policy import load_policy, open_site_ledger
    from federated.site import Guard

    settings = load_policy(policy)
    settings.coordinator_keys()  # what is wrong with them is said before the ledger is there
    if not settings.ledger.exists():
        with progress_bars() as progress:
            open_site_ledger(settings, max_gate_attempts=max_gate_attempts, progress=progress)
    Guard.open(settings)
    print(f"Ledger: {settings.ledger}. Next: dpsynth-site doctor {policy}")


@app.command()
def doctor(policy: PolicyFile, output: Format = OutputFormat.TEXT) -> None:
    """Examine policy, keys, permissions, ledger and data, and say what to mend. Exit code 3 when the guard should not start."""
    from federated.doctor import examine

    with progress_bars() as progress:
        found = examine(policy, progress=progress)
    if output is OutputFormat.JSON:
        print(json.dumps([item.__dict__ for item in found], indent=2))
    for item in found if output is OutputFormat.TEXT else ():
        print(f"{item.state:<8} {item.question}: {item.answer}")
    if any(item.state == "error" for item in found):
        raise typer.Exit(RefusedError.exit_code)


@app.command()
def serve(policy: PolicyFile) -> None:
    """Answer at the policy's Unix socket until stopped. What is refused, and why, goes to standard error."""
    from dpsynth.policy_needs import require_present
    from federated.policy import load_policy
    from federated.serve import Server
    from federated.site import Guard

    logging.basicConfig(format="%(asctime)s %(name)s %(message)s", level=logging.INFO)
    settings = load_policy(policy)
    require_present(settings.gate)  # before a round is charged whose images could never be approved
    with progress_bars() as progress:
        guard = Guard.open(settings, progress=progress)
        guard.images  # noqa: B018 (read before anybody asks, so that what is wrong with them is found here)
        server = Server(
            path=settings.socket,
            handle=guard.handle,
            largest_bytes=settings.largest_message_bytes,
            grid_seconds=settings.reply_grid_seconds,
        )
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: server.stop.set())
        server.run(listening=lambda: print(f"listening: {settings.socket}", flush=True))


@app.command()
def ledger(policy: PolicyFile, output: Format = OutputFormat.TEXT) -> None:
    """Show every charge on the site's data, federated or local, what is spent and what is left."""
    from dpsynth.cli import ledger_show
    from federated.policy import load_policy, site_ledger

    ledger_show(site_ledger(load_policy(policy)).path, output)


@app.command("data-changed")
def data_changed(policy: PolicyFile, because: Annotated[str, typer.Option("--because", metavar="WHO: WHY", help=CHANGED_BECAUSE)]) -> None:
    """Read the data again and note in the ledger that they are others now. All charges stay; studies that began end here."""
    from dpsynth.data.fingerprint import change_data
    from federated.policy import load_policy
    from federated.site import Guard

    settings, (who, why) = load_policy(policy), parse_because(because)
    with progress_bars() as progress:
        guard = Guard.open(settings)
        change_data(settings.data, guard.ledger, who=who, why=why, progress=progress)
    print(f"Noted: {settings.ledger}. Next: dpsynth-site doctor {policy}, then start the guard again.")
    if pages := sorted(str(path.parent) for path in settings.state.glob("studies/*/check/*.html")):
        print(f"Pages of checks from before show patients; delete them if one withdrew: {', '.join(dict.fromkeys(pages))}")


@app.command()
def check(policy: PolicyFile, candidates: CandidatesFile) -> None:
    """Test a study's candidates against this site's own patients. Counts as one gate attempt; what it finds stays here."""
    from dpsynth.checks.verdict import look_at
    from dpsynth.release.gate import Refused
    from federated.policy import load_policy
    from federated.site import Guard
    from federated.site_checks import check_candidates

    settings = load_policy(policy)
    with progress_bars() as progress:
        found = check_candidates(Guard.open(settings, progress=progress), candidates, progress=progress, note=print)
    for verdict in found.verdicts:
        print(verdict.line())
    reasons = found.answer.reasons if isinstance(found.answer, Refused) else ()
    print("The site's gate would refuse: " + "; ".join(reasons) + "." if reasons else "Nothing stands in the way of an approval.")
    print(look_at(found.verdicts, found.review))
    print(f"Report, which must not leave: {found.page}. Next: dpsynth-site approve, or dpsynth-site refuse")


@app.command()
def approve(
    policy: PolicyFile,
    candidates: CandidatesFile,
    out: OutOption,
    key: KeyOption = None,
    accept: Annotated[
        list[str] | None, typer.Option("--accept", metavar="CHECK=WHO: WHY", help="Accept a flag of a check after looking; stays here.")
    ] = None,
) -> None:
    """Sign that this site approves checked candidates, if its gate allows it. The statement says no more than docs/site.md lists."""
    from federated.policy import load_policy
    from federated.site import Guard
    from federated.site_approval import approve as decide

    _print_statement(decide(Guard.open(load_policy(policy)), candidates, key_path=key, out=out, reviews=parse_reviews(accept or [])))
    print(f"Approved: {out}. {_next(key)}")


@app.command()
def refuse(
    policy: PolicyFile,
    candidates: CandidatesFile,
    out: OutOption,
    because: Annotated[str, typer.Option("--because", metavar="WHO: WHY", help="Who looked, and why; stays in the ledger.")],
    key: KeyOption = None,
) -> None:
    """Sign that this site refuses checked candidates, and note it in the ledger: it can then never approve these images."""
    from federated.policy import load_policy
    from federated.site import Guard
    from federated.site_approval import refuse as decide

    guard, (who, why) = Guard.open(load_policy(policy)), parse_because(because)
    said = decide(guard, candidates, key_path=key, out=out, who=who, why=why)
    _print_statement(said)
    print(f"Refused, and noted in the ledger: {out}. {_next(key)}")
    if guard.ledger.decided(said.images_sha256, "released"):  # the refusal does not reach whoever has that approval
        print("Warning: these images were approved before, and whoever has that approval can still use it. Call the coordinator.")


@app.command("sign")
def sign_statement(
    statement: Annotated[Path, typer.Argument(metavar="STATEMENT", help="What `approve` or `refuse` wrote without a key.")],
    key: Annotated[Path, typer.Option("--key", metavar="FILE", help="The site's private signing key; `dpsynth key FOLDER` makes one.")],
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="Where to write the signed statement, for the coordinator.")],
) -> None:
    """On the officer's machine: print what a statement says, and sign it. Needs neither policy nor data."""
    from federated.officer import sign

    _print_statement(sign(statement, key_path=key, out=out))
    print(f"Signed: {out}. Send it to the coordinator.")


def _print_statement(statement: SiteStatement) -> None:
    from federated.officer import describe

    for line in describe(statement):
        print(line)


def _next(key: Path | None) -> str:
    return "Send it to the coordinator." if key else "The officer reads it and signs it: dpsynth-site sign STATEMENT --key FILE --out FILE"


def main() -> None:
    """Run the command line."""
    run_app(app, name="dpsynth-site")


if __name__ == "__main__":
    main()
