"""The coordinator's command, `dpsynth-federation`: its own, since dpsynth itself never imports the federation."""

from __future__ import annotations

import json
import signal
import sys
import threading
from pathlib import Path
from typing import Annotated

import typer

from dpsynth.cli import Format, OutputFormat, new_app, progress_bars, run_app
from dpsynth.errors import ConfigError

app = new_app("dpsynth-federation", "Train over several hospitals: certificates, approved sites, Flower with safe settings, and studies.")
Folder = Annotated[Path, typer.Argument(metavar="FOLDER", help="The coordinator's folder.")]
FlowerPrograms = Annotated[
    Path, typer.Option("--flower", metavar="BIN", envvar="DPSYNTH_FLOWER", help="Folder of Flower's programs, as in flower/bin.")
]
Days = Annotated[int, typer.Option("--days", help="How long the certificate holds.")]


@app.callback()
def options() -> None:
    """Options before the verb."""


@app.command("init-ca")
def init_ca(folder: Folder, days: Days = 730) -> None:
    """Make the CA that sites trust, and the coordinator's signing key, whose public half each site approves in its policy."""
    from dpsynth.signing import generate_key
    from federated.certs import make_ca

    certificate = make_ca(folder, days=days)
    _, public = generate_key(folder / "coordinator")
    print("For the sites, which compare the fingerprints by telephone:")
    _print_fingerprints([certificate, public])
    print(f"Next: dpsynth-federation server-cert {folder} --host NAME")


@app.command("server-cert")
def server_cert(
    folder: Folder,
    host: Annotated[list[str], typer.Option("--host", help="Name or address that sites dial; repeatable. 127.0.0.1 is always in it.")],
    days: Days = 365,
    renew: Annotated[bool, typer.Option("--renew", help="Replace the certificate that is there.")] = False,
) -> None:
    """Make the server certificate, or with --renew another one; the sites keep their ca.crt."""
    from federated.certs import make_server_certificate

    made = make_server_certificate(folder, hosts=list(dict.fromkeys([*host, "127.0.0.1"])), days=days, renew=renew)
    step = "Start `up` again, which still shows the old one" if renew else f"Next: dpsynth-federation up {folder}"
    print(f"{made}, which holds for {days} days. {step}")


@app.command("node-key")
def node_key(folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="The folder of the site's node.")]) -> None:
    """At a site: make the key pair of its Flower node. node.pub goes to the coordinator."""
    from federated.certs import make_node_key

    key, public = make_node_key(folder)
    print(f"{key} (secret)\nFor the coordinator, who compares the fingerprint by telephone:")
    _print_fingerprints([public])


@app.command()
def fingerprint(files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="ca.crt, signing.pub or node.pub.")]) -> None:
    """Print what to compare by telephone, at the coordinator or at a site, of any public file that you sent or got."""
    _print_fingerprints(files)


@app.command()
def node(
    superlink: Annotated[str, typer.Option("--superlink", metavar="HOST:PORT", help="The coordinator's address.")],
    ca: Annotated[Path, typer.Option("--ca", help="The coordinator's ca.crt.")],
    key: Annotated[Path, typer.Option("--key", help="node.key of this site.")],
    guard: Annotated[Path, typer.Option("--guard", help="The guard's socket.")],
    home: Annotated[Path, typer.Option("--home", help="Folder for Flower's own files.")],
    flower: FlowerPrograms,
    port: Annotated[int, typer.Option("--port", min=1, max=65535, help="Loopback port for the node's own app.")] = 9094,
) -> None:
    """At a site, as another user than the guard's: run Flower's node with safe settings."""
    import os

    from federated.launch import Flower, dialled, require_free

    programs = Flower(flower)
    require_free("127.0.0.1", port)
    if reason := dialled(superlink, ca=ca, key=key):
        print(f"{superlink} does not answer yet ({reason}); the node goes on trying.", file=sys.stderr, flush=True)
    home.mkdir(parents=True, exist_ok=True)
    command = programs.node_command(superlink=superlink, ca=ca.resolve(), key=key.resolve(), guard=guard.resolve(), port=port)
    os.execve(command[0], command, programs.environment(home.resolve()))  # noqa: S606 (no shell is wanted)


@app.command()
def up(
    folder: Folder,
    flower: FlowerPrograms,
    host: Annotated[str, typer.Option("--host", help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=1, max=65535, help="The one port, HTTPS.")] = 8000,
) -> None:
    """Run Flower's SuperLink and SuperExec until stopped: TLS, registered nodes only, nothing installed, nothing sent home."""
    from dpsynth.artifacts import held
    from federated.certs import require_server_certificate
    from federated.launch import Coordination, Flower, Processes, require_free

    programs = Flower(flower)
    require_server_certificate(folder)
    with held(folder, busy=f"Another `up` runs in {folder}. Stop it first, or go on with it."):
        require_free(host, port)
        processes, stop = Processes(folder), threading.Event()
        try:
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, lambda *_: stop.set())
            Coordination(folder, programs).up(processes, host=host, port=port, stop=stop)
            if not stop.is_set():
                print(f"listening: {host}:{port}", flush=True)
            while not stop.wait(1.0):
                processes.require_alive()
        finally:
            processes.close()


@app.command("approve-site")
def approve_site(
    folder: Folder,
    site: Annotated[str, typer.Argument(metavar="SITE", help="The site's name, as in its policy.")],
    public_key: Annotated[Path, typer.Argument(metavar="KEY", help="node.pub of the site.")],
    flower: FlowerPrograms,
    instead_of: Annotated[
        str | None,
        typer.Option("--instead-of", metavar="OTHER", help="The site that was given this key by mistake: both exchange what they have."),
    ] = None,
) -> None:
    """Register a site's node, while `up` runs."""
    from federated.launch import Coordination, Flower

    approved = Coordination(folder, Flower(flower)).approve(site, public_key, instead_of=instead_of)
    print(f"{site}: node {approved.node}. Compare its key with the site by telephone: {approved.key}")
    if instead_of is not None:
        print(f"{instead_of} now has the key that {site} had, if any. Approve its own with `approve-site` too.")
    if approved.replaced:
        print(f"The key that it had before is no longer let in: {approved.replaced}")


@app.command()
def run(
    study: Annotated[Path, typer.Argument(metavar="STUDY", help="YAML file of the study; docs/coordinator.md lists every setting.")],
    folder: Annotated[Path, typer.Option("--folder", help="The coordinator's folder.")],
    run_path: Annotated[Path, typer.Option("--run", metavar="RUN", help="Run folder to make.")],
    flower: FlowerPrograms,
) -> None:
    """Train over the sites, while `up` runs. The same command goes on after a crash."""
    from dpsynth.artifacts import held
    from federated.candidates import coordinators_key
    from federated.coordinator import require_quorum_online
    from federated.federation import load_federation
    from federated.launch import Coordination, Flower
    from federated.progress_view import next_step
    from federated.relay import Relay
    from federated.simulate import coordinator_of, run_study

    federation, coordination = load_federation(study), Coordination(folder, Flower(flower))
    private, nodes = coordinators_key(folder), coordination.nodes()
    if missing := [site for site in federation.asked_sites if site not in nodes]:
        raise ConfigError(f"sites: {missing[0]} is not approved. Run: dpsynth-federation approve-site {folder} {missing[0]} KEY")
    work = folder / "studies" / federation.study
    with held(
        work, busy=f"Another `run` of {federation.study} is under way. Watch it: dpsynth-federation status {folder} {federation.study}"
    ):
        relay_path = (work / "relay.sock").resolve()
        relay = Relay(path=relay_path, nodes=nodes, start=lambda: coordination.start_app(relay_path))
        coordinator = coordinator_of(federation, private=private, transport=relay, folder=work, report=_print_event)
        try:
            with progress_bars() as progress:
                guarantee = run_study(
                    coordinator,
                    run_path=run_path,
                    progress=progress,
                    ready=lambda: _warn_of(require_quorum_online(federation, coordination.online())),
                )
        finally:
            relay.close()
    print(f"{federation.study} is finished: {run_path}. {guarantee.sentence()}\nNext: {next_step(run_path, folder)}")


@app.command()
def candidates(
    run_path: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder of a study, after `dpsynth generate`.")],
    folder: Annotated[Path, typer.Option("--folder", help="The coordinator's folder.")],
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="File to write, for every site that trained.")],
) -> None:
    """Pack and sign a study's candidates, for the sites to check against their own patients."""
    from federated.candidates import pack, study_key

    header = pack(run_path, out=out, private=study_key(folder, run_path))
    print(f"Candidates of {header.study}: {out}. Each site runs: dpsynth-site check POLICY {out.name}")


@app.command()
def release(
    study: Annotated[Path, typer.Argument(metavar="STUDY", help="YAML file of the study; its site_keys say who may approve.")],
    run_path: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder of the study, after `dpsynth generate`.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to make; it must not exist.")],
    folder: Annotated[Path, typer.Option("--folder", help="The coordinator's folder.")],
    approvals: Annotated[
        list[Path], typer.Option("--approval", metavar="FILE", help="A site's signed statement, as `dpsynth-site approve` writes it.")
    ],
) -> None:
    """Ask the gate, which wants the approval of every site that was charged, and if it allows, write the signed release folder."""
    from dpsynth.release.detect import no_detector
    from dpsynth.release.federated import release_federated
    from federated.candidates import study_key
    from federated.federation import load_federation

    study_key(folder, run_path)
    home, keys = folder / "coordinator", load_federation(study).public_keys()
    with progress_bars() as progress:
        made = release_federated(run_path, out=out, key_path=home / "signing.key", approvals=approvals, site_keys=keys, progress=progress)
    if reason := no_detector(made):
        print(f"Warning: the release holds no detector, though release.detector asks for one: {reason}.")
    print(f"Released: {made}. Anyone with the public key can run: dpsynth verify {made} --key {home / 'signing.pub'}")


@app.command()
def price(
    study: Annotated[Path, typer.Argument(metavar="STUDY", help="YAML file of the study.")],
    output: Format = OutputFormat.TEXT,
) -> None:
    """Say what local noise at every site costs, beside one guard that all departments trust with their images; nobody is asked."""
    from federated.federation import load_federation
    from federated.price import describe, price_of

    found = price_of(load_federation(study))
    if output is OutputFormat.JSON:
        print(json.dumps(found.to_json(), indent=2, sort_keys=True))
        return
    for line in describe(found):
        print(line)


@app.command()
def status(
    folder: Folder,
    study: Annotated[str, typer.Argument(metavar="STUDY", help="Name of the study.")],
    output: Format = OutputFormat.TEXT,
) -> None:
    """Show rounds, sites, what each may have spent, and the last answer of each."""
    from federated.progress_view import describe, progress_of

    found = progress_of(folder / "studies" / study)
    if output is OutputFormat.JSON:
        print(json.dumps(found, indent=2, sort_keys=True))
        return
    for line in describe(found):
        print(line)


@app.command()
def demo(folder: Folder, flower: FlowerPrograms) -> None:
    """Play three hospitals on this machine, on procedural images: Flower with TLS, one study, checks at each site, a verified release."""
    from federated.demonstration import demonstrate

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that all parties are ended
    with progress_bars() as progress:
        guarantee = demonstrate(folder, flower, report=_print_event, note=print, progress=progress)
    print(guarantee.sentence())
    print(f"Report:  {folder / 'release' / 'report.html'}")
    print(f"Release: {folder / 'release'}, verified with {folder / 'coordinator' / 'coordinator' / 'signing.pub'}")


def _print_fingerprints(files: list[Path]) -> None:
    from federated.certs import fingerprint

    for path, found in [(path, fingerprint(path)) for path in files]:
        print(f"{found}  {path}")


def _warn_of(away: list[str]) -> None:
    if away:
        print(f"Warning: not connected: {', '.join(away)}. The others are enough; all are asked all the same.", file=sys.stderr, flush=True)


def _print_event(event: object) -> None:
    from federated.coordinator import Event

    if isinstance(event, Event):
        print(
            f"{'join' if event.round is None else f'round {event.round}':<8} {event.site:<12} {event.outcome:<9} {event.reason}".rstrip(),
            flush=True,
        )


def main() -> None:
    """Run the command line."""
    run_app(app, name="dpsynth-federation")


if __name__ == "__main__":
    main()
