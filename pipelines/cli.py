"""The command `reprise`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from pipelines.house_lm.cli import app as house_lm_app
from shared.config import UserError, repo_root

app = typer.Typer(
    name="reprise",
    help="Machine-learning papers re-run, and their claims put to the proof.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
data_app = typer.Typer(help="Real data: what is there, fetching it, checking it.", no_args_is_help=True)
track_app = typer.Typer(help="Tracked runs.", no_args_is_help=True)
app.add_typer(data_app, name="data")
app.add_typer(track_app, name="track")
app.add_typer(house_lm_app, name="house-lm")

INTERRUPTED = 130

PaperArgument = Annotated[str | None, typer.Argument(help="papers/<slug> or <slug>; default: the working directory")]


@app.command()
def run(
    stage: Annotated[str, typer.Argument(help="a stage of the folder's dvc.yaml, such as prepare")],
    model: Annotated[str | None, typer.Option(help="the model, where a stage runs once a model")] = None,
) -> None:
    """Run one stage of the paper in the working directory (dvc repro calls this)."""
    from pipelines.runner import run_stage

    run_stage(Path.cwd(), stage, model)


@app.command()
def verdict(
    paper: PaperArgument = None,
    profile: Annotated[str | None, typer.Option(help="default: the one that params.yaml chooses")] = None,
    show: Annotated[
        bool, typer.Option("--show", help="show the verdict that is there instead of judging anew")
    ] = False,
) -> None:
    """Hold a paper's scores against its claims: table, verdict.json, README block, MLflow tags."""
    from pipelines.papers import resolve_folder
    from pipelines.verdict import load_verdict, print_verdict, write_verdict
    from shared.config import chosen_profile

    folder = resolve_folder(paper)
    if show:
        print_verdict(load_verdict(folder, profile or chosen_profile(folder / "params.yaml")))
        return
    judged = write_verdict(folder, profile)
    # `make` shows the table at its end, whether or not this stage had to run.
    if os.environ.get("REPRISE_VERDICT") != "quiet":
        print_verdict(judged)


@app.command()
def new(
    name: Annotated[str, typer.Argument(help="name of the new folder, a Python name")],
    source: Annotated[str, typer.Option("--from", help="the paper to copy")] = "cape",
) -> None:
    """Start a project of your own as a copy of a paper's folder."""
    from pipelines.scaffold import new_paper

    folder = new_paper(repo_root(), name, source)
    typer.echo(f"{folder.relative_to(repo_root())} is ready: dvc repro papers/{name}")


@app.command()
def board() -> None:
    """The scoreboard over all papers: README table, board/index.html, MLflow experiment."""
    from pipelines.board import collect, track, update_readme, write_html

    root = repo_root()
    entries = collect(root)
    update_readme(root, entries)
    page = write_html(root, entries, root / "board" / "index.html")
    track(root, entries)
    for entry in entries:
        if entry.error:
            typer.echo(f"warning: {entry.slug}: {entry.error}", err=True)
    typer.echo(f"{len(entries)} paper(s): README.md and {page.relative_to(root)}")


@app.command()
def doctor() -> None:
    """Check this machine, this checkout, and whether committed results still match their code."""
    from pipelines.doctor import diagnose, print_report

    raise typer.Exit(print_report(diagnose(repo_root())))


@app.command()
def ui(port: Annotated[int, typer.Option(help="on 127.0.0.1")] = 5000) -> None:
    """Browse the tracked runs with MLflow, and print links straight to each experiment's runs and charts."""
    from shared.tracking import experiment_links, tracking_uri

    for name, pages in sorted(experiment_links(f"http://127.0.0.1:{port}").items()):
        typer.echo(f"{name}\n  runs:   {pages['runs']}\n  charts: {pages['charts']}")
    os.environ |= {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true"}
    command = [sys.executable, "-m", "mlflow", "ui", "--host", "127.0.0.1", "--port", str(port)]
    os.execv(sys.executable, [*command, "--backend-store-uri", tracking_uri()])


@data_app.command("list")
def data_list() -> None:
    """Per paper: the files its real data consists of, and which of them are here."""
    from pipelines.data import print_listing

    print_listing(repo_root())


@data_app.command("fetch")
def data_fetch(
    paper: PaperArgument = None,
    only: Annotated[list[str] | None, typer.Option(help="names of files to fetch; default: all")] = None,
) -> None:
    """Download a paper's official data, with checksums, and convert it."""
    from pipelines.data import fetch_paper
    from pipelines.papers import resolve_folder

    fetch_paper(resolve_folder(paper), only)


@data_app.command("verify")
def data_verify(paper: PaperArgument = None) -> None:
    """Check the files of a paper's real data against their checksums."""
    from pipelines.data import verify_paper
    from pipelines.papers import resolve_folder

    raise typer.Exit(verify_paper(resolve_folder(paper)))


@track_app.command("sync")
def track_sync() -> None:
    """Deliver to the MLflow server what could not be delivered while runs were under way."""
    from shared.tracking import sync

    report = sync()
    typer.echo(f"{report.delivered} run(s) delivered, {report.pending} pending")
    if report.error:
        raise UserError(f"the tracking server did not take everything: {report.error}")


def main() -> None:
    """Entry point: mistakes and full disks end with one message and exit status 1, Ctrl-C with 130, misuse with 2."""
    try:
        app()
    except UserError as error:
        _fail(str(error), 1)
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        _fail(f"{error.strerror or error}{where}: nothing was left half-written; mend this and run it again", 1)
    except SystemExit as end:
        # Typer turns Ctrl-C into this status, without a word to the user.
        if end.code == INTERRUPTED:
            _fail("stopped; run the same command again to continue where it was", INTERRUPTED)
        raise


def _fail(message: str, status: int) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(status)


if __name__ == "__main__":
    main()
