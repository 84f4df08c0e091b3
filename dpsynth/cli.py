"""The verbs: parse, call one function, print. Imports sit inside the verbs so that those without torch start fast.

Exit codes: 0 done, 1 broke, 2 wrong usage, configuration or input, 3 refused by the budget, a check or the gate, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dpsynth import __version__
from dpsynth.errors import DpsynthError, RefusedError, StorageError, UsageError

if TYPE_CHECKING:
    from dpsynth.progress import Progress


INTERRUPTED = 130  # 128 and the number of SIGINT, as shells have it
_STOPPED = "Stopped. What was reserved stays charged; the same command resumes, or begins again where it had kept nothing."


def new_app(name: str, purpose: str) -> typer.Typer:
    """A command line without verbs yet; `run_app` runs it."""
    return typer.Typer(
        name=name,
        help=purpose,
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )


app = new_app(
    "dpsynth", "Synthetic medical images under patient-level differential privacy: plan, train, generate, check, report, release, verify."
)
ledger_app = typer.Typer(help="The data set's ledger of everything that was charged.", no_args_is_help=True)
app.add_typer(ledger_app, name="ledger")


class OutputFormat(StrEnum):
    """For people or for scripts."""

    TEXT = "text"
    JSON = "json"


ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file; docs/config.md lists every setting.")]
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="Run folder, as made by `dpsynth train`.")]
LedgerOption = Annotated[
    Path | None,
    typer.Option("--ledger", metavar="FILE", help="Ledger of the data set. Default: beside the data, NAME.ledger.jsonl."),
]
CHANGED_BECAUSE = "Who changed the data, and why, as `Dr B: two patients withdrew`; name no patient. Stays in the ledger."
Format = Annotated[OutputFormat, typer.Option("--format", help="How to print the result.")]


def _version(value: bool) -> None:
    if value:
        print(f"dpsynth {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """Options before the verb."""


@app.command()
def plan(config: ConfigFile, output: Format = OutputFormat.TEXT) -> None:
    """Show noise, steps, time, memory and what epsilon means. Touches no image."""
    from dpsynth.config import load_config
    from dpsynth.plan import describe
    from dpsynth.plan import plan as make_plan

    result = make_plan(load_config(config))
    if output is OutputFormat.JSON:
        print(json.dumps(result.to_json(), indent=2, sort_keys=True))
        return
    width = max(len(name) for name, _ in describe(result))
    for name, value in describe(result):
        print(f"{name:<{width}}  {value}")


@app.command()
def audit(
    config: ConfigFile,
    out: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="New folder for the page, its JSON and the proposed exclusions.")],
) -> None:
    """Look over the private images before training: doubles, labels, text, permission, subgroups. Nothing of it leaves."""
    from dpsynth.audit.run import audit as audit_cohort
    from dpsynth.config import load_config

    with progress_bars() as progress:
        result = audit_cohort(load_config(config), out=out, progress=progress)
    for line in result.lines():
        print(line)
    print(f"Page: {out / 'audit.html'}. It shows patients and must not leave. To act on it: data.exclusions (docs/audit.md).")


@app.command()
def train(
    config: ConfigFile,
    run: Annotated[Path, typer.Option("--run", metavar="RUN", help="Run folder to make, or to resume after a crash.")],
    ledger: LedgerOption = None,
) -> None:
    """Reserve the budget, train the generator, settle. Run the same command again to resume after a crash."""
    from dpsynth.config import load_config
    from dpsynth.plan import plan as make_plan
    from dpsynth.train.run import train as train_generator
    from dpsynth.trained import default_ledger

    settings = load_config(config)
    for warning in make_plan(settings).warnings:
        _warn(warning)
    with progress_bars() as progress:
        guarantee = train_generator(
            settings,
            run_path=run,
            ledger_path=ledger or default_ledger(settings.data),
            progress=progress,
        )
    print(guarantee.sentence())
    print(f"Next: dpsynth generate {run}")


@app.command()
def generate(
    run: RunArgument,
    target: Annotated[
        list[str] | None,
        typer.Option(
            "--target", metavar="NAME=VALUE:SHARE,...", help="Wanted shares of an attribute or of label, as in sex=F:0.5,M:0.5; repeatable."
        ),
    ] = None,
    independent: Annotated[
        list[str] | None,
        typer.Option("--independent", metavar="NAME", help="An attribute that shall tell nothing about the label; repeatable."),
    ] = None,
) -> None:
    """Draw the candidates: as many images as the configuration says, one seed each, in the wanted mix.

    The same settings again change nothing. Another mix replaces the candidates, and removes their check after a warning.
    """
    from dpsynth.artifacts import RunFolder
    from dpsynth.generate import generate as draw
    from dpsynth.trained import is_federated

    with progress_bars() as progress:
        drawn = draw(run, progress=progress, target=_target(target or []), independent=independent or [], warn=_warn)
    for warning in drawn.warnings:
        print(f"Warning: {warning}.")
    if drawn.already:
        print("Already drawn with these settings: candidates, and their check if there is one, stay as they are.")
    done = RunFolder.open(run).is_complete("check")
    step = f"dpsynth {'report' if done else 'check'} {run}"
    if is_federated(run):
        step = f"dpsynth-federation candidates {run} --folder FED --out FILE"
    print(f"{drawn.count} candidates in {run / 'generate'}. Next: {step}")


@app.command()
def check(run: RunArgument, ledger: LedgerOption = None) -> None:
    """Test the candidates against training and control patients. Counts as one gate attempt in the ledger.

    Writes check/review.html, for the site alone: what a person is asked to look at.
    """
    from dpsynth.checks.run import check as run_all
    from dpsynth.checks.verdict import REVIEW, look_at

    with progress_bars() as progress:
        verdicts = run_all(run, ledger_path=ledger, progress=progress, note=partial(print, flush=True))
    for verdict in verdicts:
        print(verdict.line())
    print(f"These numbers were computed on patients and stay at the site.\n{look_at(verdicts, run / 'check' / REVIEW)}")
    print(f"Next: dpsynth report {run}")


@app.command()
def report(run: RunArgument, ledger: LedgerOption = None) -> None:
    """Write the epsilon report: one HTML file without scripts, and its JSON."""
    from dpsynth.release.run import report as write_report

    print(f"Report: {write_report(run, ledger_path=ledger)}")


@app.command()
def release(
    run: RunArgument,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to make; it must not exist.")],
    key: Annotated[Path, typer.Option("--key", metavar="FILE", help="Private signing key; `dpsynth key FOLDER` makes one.")],
    ledger: LedgerOption = None,
    accept: Annotated[
        list[str] | None,
        typer.Option("--accept", metavar="CHECK=WHO: WHY", help="Accept a flag of a check after looking; goes into the release."),
    ] = None,
) -> None:
    """Ask the gate, and if it allows, write the signed release folder."""
    from dpsynth.release.detect import no_detector
    from dpsynth.release.run import release as write_release

    with progress_bars() as progress:
        folder = write_release(run, out=out, key_path=key, ledger_path=ledger, reviews=parse_reviews(accept or []), progress=progress)
    if reason := no_detector(folder):
        print(f"Warning: the release holds no detector, though release.detector asks for one: {reason}.")
    print(f"Released: {folder}. Anyone with the public key can run: dpsynth verify {folder} --key {key.with_name('signing.pub')}")


@app.command()
def refuse(
    run: RunArgument,
    because: Annotated[str, typer.Option("--because", metavar="WHO: WHY", help="Who looked, and why; stays in the ledger.")],
    ledger: LedgerOption = None,
) -> None:
    """Note in the ledger that a person looked and refused these images: they can then never be released, whoever asks later."""
    from dpsynth.release.run import refuse as note_refusal

    who, why = parse_because(because)
    note_refusal(run, ledger_path=ledger, who=who, why=why)
    print("Refused, and noted in the ledger. Other images need a new `dpsynth generate` or a new run.")


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A released folder.")],
    key: Annotated[Path, typer.Option("--key", metavar="FILE", help="Public key of the releasing site.")],
    site_key: Annotated[
        list[str] | None,
        typer.Option("--site-key", metavar="SITE=FILE", help="Of several hospitals: a public key that one of them gave you; repeatable."),
    ] = None,
) -> None:
    """Tell whether a released folder is complete, unchanged and signed by the key; last line true or false. Needs no data and no torch."""
    from dpsynth.release.verify import verified
    from dpsynth.release.verify import verify as find_problems

    pairs = [item.partition("=") for item in site_key or []]
    if wrong := [name + sign + file for name, sign, file in pairs if not (name and file)]:
        raise UsageError(f"Expected --site-key SITE=FILE, found {wrong[0]!r}.")
    expected = {name: Path(file) for name, _, file in pairs}
    problems = find_problems(folder, key, expected)
    _answer(problems, [] if problems else verified(folder, key, expected))


@app.command()
def detect(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A released folder that holds detector.json.")],
    images: Annotated[list[Path], typer.Argument(metavar="IMAGES...", help="PNG or JPEG files, folders of them, npz in MedMNIST layout.")],
    key: Annotated[Path | None, typer.Option("--key", metavar="FILE", help="Public key of the site: refuse another's detector.")] = None,
    output: Format = OutputFormat.TEXT,
) -> None:
    """Tell how probable it is that images are synthetic. A probability, not evidence; needs neither data nor torch."""
    from dpsynth.release.detect import detect as judge

    found = judge(folder, images, public_key=key)
    if output is OutputFormat.JSON:
        print(json.dumps(found.to_json(), indent=2, sort_keys=True))
        return
    for name, probability in zip(found.names, found.probabilities, strict=True):
        print(f"{'unknown' if probability is None else f'{probability:.3f}':<7}  {name}")
    for line in found.lines():
        print(line)


@app.command("key")
def make_key(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where to write signing.key and signing.pub.")],
) -> None:
    """Make an Ed25519 key pair for releases. Keep signing.key secret; give signing.pub to recipients."""
    from dpsynth.signing import generate_key, key_id, load_public

    _, public = generate_key(folder)
    print(f"{folder / 'signing.key'} (secret), {folder / 'signing.pub'} (for recipients)")
    print(f"Its fingerprint, to compare by telephone: {key_id(load_public(public))}")


@ledger_app.command("open")
def ledger_open(
    config: ConfigFile,
    epsilon: Annotated[float, typer.Option("--epsilon", help="Budget of the data set over all runs; inf for research only.")],
    delta: Annotated[float | None, typer.Option("--delta", help="Default: min(1e-5, 1/(10 * declared_patients)).")] = None,
    max_gate_attempts: Annotated[int, typer.Option("--max-gate-attempts", help="Per trained generator.")] = 3,
    ledger: LedgerOption = None,
) -> None:
    """Open the ledger of a data set: the data owner's budget becomes its first line and cannot be changed."""
    from dpsynth.config import load_config
    from dpsynth.data.fingerprint import open_ledger
    from dpsynth.trained import default_ledger

    settings = load_config(config)
    path = ledger or default_ledger(settings.data)
    with progress_bars() as progress:
        open_ledger(settings, path=path, epsilon=epsilon, delta=delta, max_gate_attempts=max_gate_attempts, progress=progress)
    print(f"Ledger: {path}")


@ledger_app.command("data-changed")
def ledger_data_changed(
    config: ConfigFile,
    because: Annotated[str, typer.Option("--because", metavar="WHO: WHY", help=CHANGED_BECAUSE)],
    ledger: LedgerOption = None,
) -> None:
    """Read the data again and note in their ledger that they are others now. All charges stay; runs that are not over end here."""
    from dpsynth.config import load_config
    from dpsynth.data.fingerprint import change_data
    from dpsynth.privacy.ledger import Ledger
    from dpsynth.trained import default_ledger

    settings, (who, why) = load_config(config), parse_because(because)
    path = ledger or default_ledger(settings.data)
    with progress_bars() as progress:
        change_data(settings.data, Ledger.load(path), who=who, why=why, progress=progress)
    print(f"Noted: {path}")


@ledger_app.command("show")
def ledger_show(
    ledger: Annotated[Path, typer.Argument(metavar="LEDGER", help="A ledger file.")], output: Format = OutputFormat.TEXT
) -> None:
    """Show every charge, what is spent and what is left."""
    from dpsynth.privacy.ledger import Ledger

    summary = Ledger.load(ledger).summary()
    if output is OutputFormat.JSON:
        print(json.dumps(summary, indent=2, sort_keys=True))
        return
    print(f"{summary['data_name']} ({summary['unit']}): budget epsilon {summary['epsilon']} at delta {summary['delta']:.3g}")
    said = [(row, f"{row['state']:<9} epsilon alone {_figure(row['epsilon'])}  {row['purpose']}") for row in summary["charges"]]
    said += [(row, f"{'changed':<9} the data; {_words(row)}") for row in summary["data_changes"]]
    said += [
        (
            row,
            f"{row['decision']:<9} images {row['candidates_sha256'][:16]} of run {row['run_id']}; {_words(row) or 'no flag was accepted'}",
        )
        for row in summary["decisions"]
    ]
    for row, text in sorted(said, key=lambda item: int(item[0]["line"])):
        print(f"line {row['line']:>4}  {row['time']}  {text}")
    print(f"spent {_figure(summary['spent'])}, left {_figure(summary['left'])}, gate attempts {summary['gate_attempts']}")


def _words(row: dict[str, Any]) -> str:
    return "; ".join(f"{who}: {why}" for who, why in row["words"].items())


@ledger_app.command("verify")
def ledger_verify(
    ledger: Annotated[Path, typer.Argument(metavar="LEDGER", help="A ledger file.")],
    release: Annotated[
        Path | None, typer.Option("--release", metavar="FOLDER", help="A folder released under this ledger: finds an older copy put back.")
    ] = None,
) -> None:
    """Check chain, head, budget and every charge; name each line that does not hold. The last line is true or false."""
    from dpsynth.privacy.ledger import Ledger
    from dpsynth.release.verify import ledger_anchors, verified_ledger

    anchors = [None] if release is None else ledger_anchors(release)  # of several hospitals' heads, this ledger must have one
    problems = min((Ledger.problems_of(ledger, anchor=anchor) for anchor in anchors), key=len)
    _answer(problems, [] if problems else verified_ledger(ledger, anchored=release is not None))


def _answer(problems: list[str], established: list[str]) -> None:
    """What was found, and in the last line true or false."""
    for line in problems or established:
        print(line)
    print("false" if problems else "true")
    if problems:
        raise typer.Exit(RefusedError.exit_code)


@app.command()
def quickstart(folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="New folder for the demonstration.")]) -> None:
    """Play the whole way on procedural images: ledger, train, generate, check, report, release, verify."""
    from dpsynth.quickstart import quickstart as play

    with progress_bars() as progress:
        play(folder, progress=progress)


def _warn(text: str) -> None:
    print(f"Warning: {text}.", file=sys.stderr, flush=True)


def _figure(value: float | str) -> str:
    return "infinite" if isinstance(value, str) else f"{value:.3f}"


def parse_reviews(accepted: list[str]) -> dict[str, str]:
    """Parse `CHECK=WHO: WHY`. Raises UsageError."""
    reviews = {}
    for item in accepted:
        check_name, _, text = item.partition("=")
        who, _, why = text.partition(":")
        if not (check_name.strip() and who.strip() and why.strip()):
            raise UsageError(f"Expected --accept CHECK=WHO: WHY, found {item!r}.")
        reviews[check_name.strip()] = text.strip()
    return reviews


def parse_because(text: str) -> tuple[str, str]:
    """Parse `WHO: WHY`. Raises UsageError."""
    who, _, why = (part.strip() for part in text.partition(":"))
    if not (who and why):
        raise UsageError(f"Expected --because 'WHO: WHY', found {text!r}.")
    return who, why


def _target(given: list[str]) -> dict[str, dict[str, float]]:
    """Parse `NAME=VALUE:SHARE,...`. Raises UsageError."""
    target: dict[str, dict[str, float]] = {}
    for item in given:
        name, _, text = item.partition("=")
        pairs = [part.rpartition(":") for part in text.split(",")]
        try:
            target[name.strip()] = {value.strip(): float(share) for value, _, share in pairs}
        except ValueError as error:
            raise UsageError(f"Expected --target NAME=VALUE:SHARE,VALUE:SHARE, found {item!r}.") from error
    return target


@contextmanager
def progress_bars() -> Iterator[Progress]:
    """Bars on standard error."""
    from dpsynth.progress import terminal_progress

    with terminal_progress() as progress:
        yield progress


def main() -> None:
    """Run the command line."""
    run_app(app, name="dpsynth")


def run_app(command: typer.Typer, *, name: str) -> None:
    """Run a command line; every error becomes one line and an exit code."""
    fail = partial(_fail, name)
    try:
        code = command(standalone_mode=False)
    except DpsynthError as error:
        fail(str(error), error.exit_code)
    except typer.TyperException as error:
        fail(f"{error.format_message()} `{_verb_of(error, name)} --help` lists verbs and options.", 2)
    except (typer.Abort, KeyboardInterrupt):
        fail(_STOPPED, INTERRUPTED)
    except OSError as error:
        where = "" if error.filename is None else f" ({Path(str(error.filename)).name})"
        fail(
            str(
                StorageError(f"A file could not be read or written{where}: {error.strerror or error}. Check the path and its permissions.")
            ),
            2,
        )
    except ModuleNotFoundError as error:
        fail(f"This verb needs {error.name}, which is not installed. Run: pip install 'dpsynth[train]'.", 2)
    except Exception as error:
        if os.environ.get("DPSYNTH_DEBUG"):
            raise
        fail(f"Internal error ({type(error).__name__}): {error}. Set DPSYNTH_DEBUG=1 to see where.", 1)
    if code == INTERRUPTED:  # typer turns Ctrl-C into this code
        fail(_STOPPED, INTERRUPTED)
    sys.exit(code if isinstance(code, int) else 0)


def _verb_of(error: typer.TyperException, name: str) -> str:
    """The command with the verbs that an error of its options is about."""
    context, verbs = getattr(error, "ctx", None), list[str]()
    while context is not None and context.parent is not None:
        verbs.insert(0, str(context.info_name))
        context = context.parent
    return " ".join([name, *verbs])


def _fail(name: str, message: str, code: int) -> None:
    print(f"{name}: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
