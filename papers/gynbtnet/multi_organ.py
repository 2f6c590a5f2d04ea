"""Stage 2: trains the whole network on many organs, from scratch and from the encoder of stage 1."""

from __future__ import annotations

from shared.config import Stage
from shared.training import Job
from shared.training.parallel import Report

from . import data
from .config import SECOND_STAGE, Params
from .train import run_side_by_side, train_segmenter


def multi_organ(stage: Stage[Params]) -> None:
    """Train both, all seeds side by side; weights to runs/multi_organ/<variant>/seed<n>."""
    run_side_by_side(
        stage,
        [
            Job(f"{variant}, seed {seed}", _train, (stage, variant, seed))
            for variant in SECOND_STAGE.values()
            for seed in stage.params.seeds
        ],
    )


def _train(stage: Stage[Params], variant: str, seed: int, report: Report) -> float:
    cases = data.load(stage.data_dir).read("multi_organ")
    return train_segmenter(stage, variant, seed, cases, stage.params.multi_organ, report)
