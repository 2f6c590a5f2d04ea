"""Scores by hand, the pipeline at tiny size, and its figures."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from shared.config import Stage, load_params
from shared.evaluation.scores import overall, read_scores

from .. import data, figures
from ..config import FAMILIES, Params, SpeedSettings
from ..evaluate import diagnosis_rows, evaluate, harm, held_out_queries, permutation_tests, sparse_mrr
from ..speed import batched, looped, measure
from ..train import train

FOLDER = Path(__file__).parents[1]


def tiny() -> Params:
    return load_params(FOLDER / "params.yaml", Params, "tiny")[1]


def test_sparse_reciprocal_ranks_by_hand() -> None:
    ranked = np.array([[7, 3, 5], [1, 2, 3], [4, -1, -1]])
    assert sparse_mrr(ranked, np.array([3, 9, 4])).tolist() == [0.5, 0, 1]
    assert sparse_mrr(ranked, np.array([5, 1, 4]), depth=2).tolist() == [0, 1, 1]


def scores(values: dict[tuple[str, str], list[list[float]]]) -> pd.DataFrame:
    """nDCG of (dataset, model), a row a seed, a column a query."""
    return pd.DataFrame(
        {"model": model, "dataset": dataset, "metric": "ndcg@10", "seed": seed, "item": item, "value": value}
        for (dataset, model), table in values.items()
        for seed, row in enumerate(table)
        for item, value in enumerate(row)
    )


def test_harm_is_by_query_and_seed() -> None:
    frame = scores(
        {
            ("weak_pool", "plain_weak"): [[0.5, 0.4], [0.6, 0.2]],
            ("weak_pool", "plain_strong"): [[0.4, 0.4], [0.3, 0.3]],
            ("complete", "plain_weak"): [[0.5, 0.5]],
        }
    )
    oracle = {("weak_pool", "oracle_weak"): [[0.5]], ("weak_pool", "oracle_strong"): [[0.3]]}
    assert {row["model"]: row["value"] for row in harm(scores(oracle))} == {"no_false_negatives": pytest.approx(0.2)}
    rows = list(harm(frame))
    assert [row["value"] for row in rows] == pytest.approx([0.1, 0, 0.3, -0.1])
    assert {row["model"] for row in rows} == {"weak_pool"}
    assert [(row["seed"], row["item"]) for row in rows] == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_variants_are_tested_against_the_unweighted_ranker() -> None:
    """All of six queries better: 2 of the 64 sign changes are as far from 0."""
    frame = scores(
        {
            ("weak_pool", "plain_strong"): [[0.1 * q for q in range(6)]] * 2,
            ("weak_pool", "cet_strong"): [[0.1 * q + 0.1 for q in range(6)]] * 2,
            ("weak_pool", "strong"): [[0.3] * 6],
            ("weak_pool", "cet_bm25"): [[0.3] * 6] * 2,
        }
    )
    (row,) = permutation_tests(frame)
    assert row["model"] == "cet_strong"
    assert row["value"] == pytest.approx(2 / 64)


def test_diagnoses_are_means_over_folds_that_have_one() -> None:
    nan = float("nan")
    folds = [
        {"auc_of_weights": [nan, 0.4], "pool_correlation_of_selection": [0.1, 0.2], "weight_of_false": [nan, nan]},
        {"auc_of_weights": [nan, 0.6], "pool_correlation_of_selection": [0.3, nan], "weight_of_false": [nan, nan]},
    ]
    rows = {
        (row["model"], row["metric"], row.get("epoch")): row["value"]
        for row in diagnosis_rows("cet_bm25", "weak_pool", 0, folds, by_epoch=True)
    }
    assert rows == {
        ("cet_bm25", "auc_of_weights", None): pytest.approx(0.5),
        ("cet_bm25", "auc_of_weights", 2): pytest.approx(0.5),
        ("selection_cet_bm25", "pool_correlation", None): pytest.approx(0.2),
    }


def test_what_is_timed_does_the_same_arithmetic() -> None:
    settings = SpeedSettings(pairs=3, members=2, features=4)
    together, apart = batched(settings)()["relevance"], looped(settings)()
    for loss, losses in zip(together, apart, strict=True):
        torch.testing.assert_close(loss, torch.cat(losses).mean())
    rows = {(row["model"], row["metric"]): row["value"] for row in measure(settings)}
    seconds = rows["loop", "seconds_per_step"] / rows["batched", "seconds_per_step"]
    assert rows["loop_over_batched", "ratio"] == seconds


# --- the whole pipeline ---


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Stage[Params]:
    folder = tmp_path_factory.mktemp("pipeline")
    for path in (*FOLDER.glob("*.py"), *FOLDER.glob("*.yaml")):
        (folder / path.name).write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
    stage = Stage(folder, "evaluate", "tiny", tiny())
    data.prepare(stage)
    for family in FAMILIES:
        train(replace(stage, name="train", model=family))
    evaluate(stage)
    return stage


def test_the_pipeline_scores_all_models(pipeline: Stage[Params]) -> None:
    table = read_scores(pipeline.results_dir / "scores.csv")
    assert np.isfinite(table.value).all()
    for name, experiment in pipeline.params.experiments.items():
        for model in experiment.trained():
            rows = table[table.dataset.eq(name) & table.model.eq(model)]
            assert {"ndcg@10", "mrr@10", "map", "recall@20", "sparse_mrr@10"} <= set(rows.metric)
            assert set(rows[rows.metric.eq("ndcg@10")].seed) == {0, 1, 2}
    ranks = table[table.metric.isin(["ndcg@10", "mrr@10", "map", "recall@20"])]
    assert ranks.value.between(0, 1).all()
    harmed = {"weak_pool", "strong_pool", "complete", "no_false_negatives"}
    assert set(table[table.metric.eq("harm")].model) == harmed
    # What is kept by query, and what as a mean.
    assert table[table.dataset.eq("weak_pool") & table.metric.eq("ndcg@10")].item.notna().all()
    assert table[table.dataset.eq("complete") & table.metric.eq("ndcg@10")].item.isna().all()
    assert table[table.metric.eq("mrr@10")].item.isna().all()
    assert (pipeline.results_dir / "costs.csv").is_file()
    metrics = json.loads((pipeline.results_dir / "metrics.json").read_text())
    assert metrics["data_source"] == "generated: topics and styles"


def test_every_query_is_tested_once_a_seed(pipeline: Stage[Params]) -> None:
    table = read_scores(pipeline.results_dir / "scores.csv")
    rows = table[table.model.eq("cet_bm25") & table.metric.eq("ndcg@10")]
    prepared = data.load(pipeline.data_dir)
    assert len(held_out_queries(pipeline.params, prepared)) == prepared.num_queries
    assert len(rows) == prepared.num_queries * 3
    assert not rows.duplicated(["seed", "item"]).any()


def test_false_negatives_are_a_count(pipeline: Stage[Params]) -> None:
    table = read_scores(pipeline.results_dir / "scores.csv")
    prepared = data.load(pipeline.data_dir)
    rows = overall(table[table.metric.eq("false_negatives") & table.dataset.eq("weak_pool")]).set_index("model")
    shares = []
    for query in range(prepared.num_queries):
        label = prepared.labels["weak_pool"][query, 0]
        if label >= 0:
            found = [slot for slot in prepared.sources["bm25"][query] if slot >= 0 and slot != label]
            shares.append(np.mean([prepared.relevant[query, slot] for slot in found]))
    assert rows.value["bm25"] == pytest.approx(np.mean(shares))
    of_complete = table[table.metric.eq("false_negatives") & table.dataset.eq("complete")]
    assert not of_complete.value.any()


def test_figures_are_drawn(pipeline: Stage[Params]) -> None:
    drawn = {path.name for path in pipeline.results_dir.glob("*.png")}
    assert drawn == {"ndcg_by_source.png", "false_negatives.png", "weights.png"}


def test_intervals_need_two_values() -> None:
    frame = scores({("a", "b"): [[0.5]], ("a", "c"): [[0.5, 0.6], [0.4, 0.7]]})
    assert figures.interval(frame[frame.model.eq("b")]) is None
    found = figures.interval(frame[frame.model.eq("c")])
    assert found.low <= 0.55 <= found.high
