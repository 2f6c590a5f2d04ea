"""`reprise house-lm`: train house models, and see what they can do."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="House language models: train them, see what they can do.", no_args_is_help=True)

FolderOption = Annotated[
    Path | None, typer.Option(help="where params.yaml, models/ and results/ are; default: pipelines/house_lm")
]
ProfileOption = Annotated[str | None, typer.Option(help="default: the one that params.yaml chooses")]


@app.command()
def train(
    mixture: Annotated[str, typer.Option(help="what it is trained on, as in params.yaml")],
    size: Annotated[str, typer.Option(help="S, M, T or D")] = "S",
    seed: Annotated[
        list[int] | None, typer.Option(help="may be given several times; default: all, side by side")
    ] = None,
    profile: ProfileOption = None,
    folder: FolderOption = None,
    workers: Annotated[int | None, typer.Option(help="processes; default: one a core")] = None,
) -> None:
    """Train a mixture's models and test them; what is finished already is only tested."""
    from pipelines.house_lm import config
    from pipelines.house_lm.stages import train_seeds

    folder = (folder or default_folder()).resolve()
    chosen, params = config.load(folder, profile)
    train_seeds(folder, chosen, params, mixture, size, seed or params.seeds, workers=workers)


@app.command()
def gates(folder: FolderOption = None) -> None:
    """What every trained model can do, beside a bigram model and chance."""
    from rich.console import Console
    from rich.table import Table

    from shared.evaluation.abilities import COLUMNS, read_gates

    table = Table(*COLUMNS, box=None)
    for path in sorted(((folder or default_folder()) / "models").glob("*/*/*/gates.csv")):
        for row in read_gates(path.parent):
            values = [row[name] for name in COLUMNS]
            table.add_row(*("" if v is None else f"{v:.3g}" if isinstance(v, float) else str(v) for v in values))
    width = None if shutil.get_terminal_size().columns > 120 else 140
    Console(width=width).print(table if table.row_count else "no model is trained yet: reprise house-lm train --help")


def default_folder() -> Path:
    """The working directory where it holds the pipeline (as under DVC), else the checkout's."""
    from shared.config import repo_root

    here = Path.cwd()
    return here if here.name == "house_lm" and (here / "params.yaml").is_file() else repo_root() / "pipelines/house_lm"
