"""The hospital's command: `dpsynth-site init | doctor | serve | ledger`. Errors are one line and an exit code, as with `dpsynth`."""

from __future__ import annotations

import json
import logging
import signal
from pathlib import Path
from typing import Annotated

import typer

from dpsynth.cli import Format, OutputFormat, new_app, progress_bars, run_app
from dpsynth.errors import RefusedError

app = new_app(
    "dpsynth-site",
    "The hospital's guard in a federation: it owns data, policy and ledger, and refuses what they do not allow, whoever asks.",
)
PolicyFile = Annotated[Path, typer.Argument(metavar="POLICY", help="The site's policy; docs/site.md lists every setting.")]


@app.callback()
def options() -> None:
    """Options before the verb."""


@app.command()
def init(
    policy: PolicyFile,
    max_gate_attempts: Annotated[int, typer.Option("--max-gate-attempts", help="Per trained generator, for the site's own releases.")] = 3,
) -> None:
    """Read the data set once and open its ledger with the policy's epsilon and delta. A ledger that is there stays as it is."""
    from dpsynth.config import Config, ReleaseConfig
    from dpsynth.data.fingerprint import open_ledger
    from federated.policy import load_policy
    from federated.site import Guard

    settings = load_policy(policy)
    if not settings.ledger.exists():
        config = Config(data=settings.data, release=ReleaseConfig(formats=("nifti",)))
        with progress_bars() as progress:
            open_ledger(
                config,
                path=settings.ledger,
                epsilon=settings.epsilon,
                delta=settings.delta,
                max_gate_attempts=max_gate_attempts,
                progress=progress,
            )
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
    from federated.policy import load_policy
    from federated.serve import Server
    from federated.site import Guard

    logging.basicConfig(format="%(asctime)s %(name)s %(message)s", level=logging.INFO)
    settings = load_policy(policy)
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
        print(f"listening: {settings.socket}", flush=True)
        server.run()


@app.command()
def ledger(policy: PolicyFile, output: Format = OutputFormat.TEXT) -> None:
    """Show every charge on the site's data, federated or local, what is spent and what is left."""
    from dpsynth.cli import ledger_show
    from federated.policy import load_policy

    ledger_show(load_policy(policy).ledger, output)


def main() -> None:
    """Run the command line."""
    run_app(app, name="dpsynth-site")


if __name__ == "__main__":
    main()
