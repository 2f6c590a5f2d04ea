"""The whole pipeline at tiny size, and how scores come of the networks' records."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from shared.config import Stage, UserError, load_params
from shared.evaluation.scores import read_scores

from .. import data
from ..config import STAGES, Params
from ..evaluate import cube, evaluate, more_training_rows, population_rows, ssn_rows
from ..evolve import evolve
from ..train import Member, load_graphs, members, train

FOLDER = Path(__file__).parents[1]


def run(folder: Path) -> Path:
    """Run all stages in a copy of the folder; returns where its results lie."""
    shutil.copytree(FOLDER, folder, ignore=shutil.ignore_patterns("data", "runs", "results", "__pycache__", "tests"))
    stage: Stage[Params] = Stage(folder, "prepare", "tiny", load_params(folder / "params.yaml", Params, "tiny")[1])
    data.prepare(stage)
    evolve(stage)
    for name in STAGES:
        train(replace(stage, name="train", model=name))
    evaluate(replace(stage, name="evaluate"))
    return stage.results_dir


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("pipeline") / "paper")


def test_scores_of_the_pipeline(results: Path) -> None:
    scores = read_scores(results / "scores.csv")
    assert np.isfinite(scores.value).all()
    assert set(scores.dataset) == {"1_epochs", "2_epochs", "3_epochs", "more_training", "evolution"}
    networks = scores[(scores.metric == "eval_accuracy") & scores.replicate.notna()]
    counts = networks[networks.dataset == "2_epochs"].groupby("model").size().to_dict()
    assert counts == {"baseline": 12, "ssn": 24, "one_graph": 12, "ssn_dedup_edges": 3, "ssn_intended_grid": 3}
    assert {"majority", "layout", "linear"} <= set(scores.model)
    shares = scores[scores.metric.str.startswith("share_") & scores.bound.isna() & (scores.dataset == "2_epochs")]
    assert shares.value.sum() == pytest.approx(1)
    names = {path.name for path in results.glob("*.png")}
    assert names == {f"{name}.png" for name in ("graphs", "train_against_eval", "ranks", "variance", "evolution")}


def test_a_longer_baseline_repeats_the_short_one(results: Path) -> None:
    """Replicate 0 of `baseline_long` is replicate 0 of `baseline`, trained on."""
    scores = read_scores(results / "scores.csv")
    chosen = scores[(scores.dataset == "1_epochs") & (scores.metric == "eval_accuracy") & (scores.replicate == 0)]
    first, longer = (chosen[chosen.model == name].sort_values("seed").value for name in ("baseline", "baseline_long"))
    assert first.tolist() == longer.tolist()


# --- Members and rows -------------------------------------------------------------------------------------------------


def test_variants_share_seeds_and_the_control_does_not() -> None:
    ssn, variant = Member("ssn", "abc", 1, 0), Member("ssn_dedup_edges", "abc", 1, 0)
    assert ssn.seed(0) == variant.seed(0)
    assert Member("baseline", None, 1, 0).seed(0) == Member("baseline_long", None, 1, 0).seed(0)
    others = [Member("one_graph", "abc", 1, 0), Member("ssn", "abc", 1, 1), Member("ssn", "abc", 0, 0)]
    assert len({ssn.seed(0), ssn.seed(1), *(member.seed(0) for member in others)}) == 5


def test_members_of_populations(results: Path) -> None:
    folder = results.parents[1]
    params = load_params(folder / "params.yaml", Params, "tiny")[1]
    graphs = load_graphs(Stage(folder, "train", "tiny", params))
    assert len(graphs) == 4
    ssn = members(params, "ssn", graphs)
    assert {member.graph for member in ssn} == set(graphs)
    assert len(set(ssn)) == 4 * 3 * 2
    assert {member.graph for member in members(params, "one_graph", graphs)} == {data.typical_graph(graphs)}
    assert {member.graph for member in members(params, "baseline", graphs)} == {None}


def networks() -> pd.DataFrame:
    """Two graphs, three training sets and two replicates; four seeds of a baseline. Accuracies are made up."""
    rows = []
    for training_set in range(3):
        for replicate in range(2):
            for graph, base in (("x", 0.6), ("y", 0.7)):
                value = base + 0.01 * training_set + 0.02 * replicate
                rows.append(("ssn", "4_epochs", graph, training_set, replicate, base + 0.1, value))
        for replicate in range(4):
            rows.append(("baseline", "4_epochs", None, training_set, replicate, 0.9, 0.60 + 0.02 * replicate))
    columns = ["population", "dataset", "graph", "training_set", "replicate", "train", "eval"]
    return pd.DataFrame(rows, columns=columns)


def test_statistics_of_populations_by_hand() -> None:
    rows = {(row["model"], row["metric"], row["seed"]): row["value"] for row in population_rows(networks())}
    # Per replicate the graphs differ by 0.1: a variance of 0.005.
    assert rows["ssn", "eval_variance", 1] == pytest.approx(0.005)
    assert rows["baseline", "eval_variance", 1] == pytest.approx(np.var([0, 0.02, 0.04, 0.06], ddof=1))
    assert rows["ssn", "gap", 0] == pytest.approx(0.75 - 0.66)
    assert rows["ssn", "top_half_eval", 0] == pytest.approx(0.71)
    assert rows["ssn", "bottom_half_eval", 0] == pytest.approx(0.61)
    # Bests of two, the smaller population: of six pairs of the baseline's four seeds.
    assert rows["ssn", "best_eval", 0] == pytest.approx(0.71)
    assert rows["baseline", "best_eval", 0] == pytest.approx((0.62 + 2 * 0.64 + 3 * 0.66) / 6)
    assert rows["ssn", "fitted_runs", 0] == 2
    assert ("ssn", "train_eval_correlation_fitted", 0) not in rows
    assert rows["baseline", "train_eval_correlation", 0] == 0
    assert rows["ssn_chosen", "retrained_eval", 0] == pytest.approx(0.71)
    assert rows["ssn_dropped", "retrained_eval", 0] == pytest.approx(0.61)
    assert rows["ssn", "graph_agreement", 2] == pytest.approx(1)
    assert rows["ssn", "graph_share", 0] == pytest.approx((0.01 - 0.0002) / (0.01 + 0.0002))


def test_accuracies_are_sorted_into_a_cube() -> None:
    ssn = networks()[lambda frame: frame.population == "ssn"]
    values = cube(ssn.sample(frac=1, random_state=0), "eval")
    assert values.shape == (2, 3, 2)
    assert values[1, 2, 1] == pytest.approx(0.7 + 0.02 + 0.02)
    assert not list(ssn_rows("4_epochs", ssn[ssn.replicate == 0]))


def test_epochs_of_baselines_stand_side_by_side() -> None:
    rows = list(more_training_rows(networks()))
    assert {row["model"] for row in rows} == {"baseline_4_epochs"}
    assert len(rows) == 12


@pytest.mark.parametrize("model", [None, "gin", "ssn_dedup_edges"])
def test_a_stage_that_is_not_there(tmp_path: Path, model: str | None) -> None:
    params = load_params(FOLDER / "params.yaml", Params, "tiny")[1]
    with pytest.raises(UserError, match="train needs one of baseline, ssn, one_graph, variants"):
        train(Stage(tmp_path, "train", "tiny", params, model))
