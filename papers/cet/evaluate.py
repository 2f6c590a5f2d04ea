"""Scores every ranker on held-out queries, the retrievers beside them, and what the weights did; draws the figures.

Models re-rank the same candidates, the top of BM25; equal scores keep its order. `ndcg@10`, `mrr@10`, `map` and
`recall@20` are against all judgments, of all tested queries, those without a label included; `sparse_mrr@10` is against
the labels of the weak pool alone, of the queries that have one, as MS MARCO judges. `item` is the query: claims are
judged by resampling seeds and queries.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from shared.config import Stage
from shared.evaluation.ranking import paired_permutation_test, ranking_metrics
from shared.evaluation.scores import write_metrics, write_scores
from shared.tracking import open_run
from shared.training import Job, run_jobs
from shared.training.parallel import Report

from . import data, figures
from .config import SOURCES, MSMarco, Params
from .data import PAD, Prepared
from .diagnosis import score_slots
from .sampling import Member, relevance_of, usable
from .speed import measure
from .train import Trained, load_trained, make_inputs, member_groups, run_folder

Row = dict[str, Any]
METRICS = ("ndcg@10", "mrr@10", "map", "recall@20")
# Whose scores against the sparse labels are kept by query; of others the means, which are a hundredth of the rows.
SPARSELY_JUDGED = ("plain_bm25", "plain_strong", "cet_bm25", "cet_strong")
BY_QUERY = ("ndcg@10", "mrr@10", "sparse_mrr@10")
BY_EPOCH = ("auc_of_weights", "auc_of_relevance", "variation_of_weights", "weight_of_true", "weight_of_false")
HARM = "strong_against_weak"
# Of values by query and by epoch: enough for an interval, and a table of half the size.
DIGITS = 3


def evaluate(stage: Stage[Params]) -> None:
    """Write scores.csv, costs.csv (which no two runs measure alike), metrics.json and figures."""
    prepared = data.load(stage.data_dir)
    jobs = [
        Job(f"{model}, {name}", score_model, (stage, name, model))
        for name, experiment in stage.params.experiments.items()
        for model in experiment.trained()
    ]
    workers = 1 if torch.cuda.is_available() else stage.params.workers
    results = run_jobs(jobs, workers=workers, threads=stage.params.threads)
    rows = [row for rows, _ in results for row in rows]
    rows += retrievers(stage.params, prepared)
    rows += false_negatives(stage.params, prepared)
    frame = pd.DataFrame(rows)
    derived = pd.DataFrame([*harm(frame), *permutation_tests(frame)])
    frame = pd.concat([condensed(frame, stage.params), derived], ignore_index=True)
    write_scores(stage.results_dir / "scores.csv", frame)
    costs = [row for _, rows in results for row in rows] + (measure(stage.params.speed) if stage.params.speed else [])
    write_scores(stage.results_dir / "costs.csv", pd.DataFrame(costs))
    write_metrics(stage, frame, prepared.attrs["source"])
    paths = figures.draw(stage, frame)
    if stage.run:
        stage.run.log_table(stage.results_dir / "scores.csv")
        for path in paths:
            stage.run.log_artifact(path, "figures")
        track_scores(stage, frame)


# --- Rankings ---------------------------------------------------------------------------------------------------------


def score_model(stage: Stage[Params], name: str, model: str, report: Report) -> tuple[list[Row], list[Row]]:
    """Rows of scores.csv of a model, all its seeds, and rows of costs.csv."""
    prepared = data.load(stage.data_dir)
    experiment = stage.params.experiments[name]
    inputs = make_inputs(stage.params, prepared, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    ranked = {seed: np.full(prepared.reranked.shape, PAD, np.int64) for seed in stage.params.seeds}
    rows, costs = [], []
    histories: dict[int, list[dict[str, list[float]]]] = defaultdict(list)
    groups = member_groups(stage.params)
    for number, members in enumerate(groups):
        trained = load_trained(stage, prepared, name, model, members)
        rerank(trained, prepared, inputs, members, ranked)
        for place, member in enumerate(members):
            histories[member.seed].append(
                {metric: [epoch[place % len(epoch)] for epoch in values] for metric, values in trained.history.items()}
            )
        costs.append(_row(model, name, f"seconds_{_name(members)}", members[0].seed, trained.seconds))
        report((number + 1) / len(groups), "")
    tested = held_out_queries(stage.params, prepared)
    for seed in stage.params.seeds:
        rows += ranking_rows(stage.params, prepared, name, model, seed, ranked[seed], tested)
        rows += diagnosis_rows(model, name, seed, histories[seed], by_epoch=experiment.by_query)
    return rows, costs


def held_out_queries(params: Params, prepared: Prepared) -> NDArray[np.int64]:
    """Queries that some member is tested on, int64 [tested]."""
    folds = {member.fold for members in member_groups(params) for member in members}
    return np.flatnonzero(np.isin(prepared.fold, list(folds)))


def rerank(
    trained: Trained,
    prepared: Prepared,
    inputs: Any,
    members: Sequence[Member],
    ranked: dict[int, NDArray[np.int64]],
) -> None:
    """Fill in the rankings [Q, R] of each seed, of the queries that its members were not trained on."""
    folds = {member.fold for member in members}
    rows = np.flatnonzero(np.isin(prepared.fold, list(folds)))
    slots = prepared.reranked[rows]
    scores = score_slots(trained.relevance, inputs, slots, rows)
    for place, member in enumerate(members):
        own = prepared.fold[rows] == member.fold
        order = np.argsort(-scores[place, own], axis=1, kind="stable")
        chosen = np.take_along_axis(slots[own], order, axis=1)
        documents = np.take_along_axis(prepared.documents[rows[own]], np.maximum(chosen, 0), axis=1)
        ranked[member.seed][rows[own]] = np.where(chosen >= 0, documents, PAD)


def ranking_rows(
    params: Params,
    prepared: Prepared,
    name: str,
    model: str,
    seed: int,
    ranked: NDArray[np.int64],
    tested: NDArray[np.int64],
) -> Iterator[Row]:
    """Metrics of rankings [Q, R], of the tested queries; those of `BY_QUERY` a row a query."""
    given = isinstance(params.corpus, MSMarco)
    # Claims look at the collections one by one for the unweighted ranker alone.
    by_collection = model.startswith("plain_") and len(prepared.groups) > 1 and not given
    metrics = ranking_metrics(ranked[tested], prepared.grades[tested], METRICS)
    groups = prepared.group[tested]
    for dataset, chosen in _datasets(prepared, name, groups, given):
        for metric in METRICS:
            values = metrics[metric].to_numpy()[chosen]
            if metric not in BY_QUERY:
                yield _row(model, dataset, metric, seed, values.mean())
                continue
            for item, value in zip(tested[chosen].tolist(), values, strict=True):
                row = _row(model, dataset, metric, seed, _short(value)) | {"item": item}
                yield row | ({"collection": prepared.groups[prepared.group[item]]} if by_collection else {})
    if not given:
        labels = prepared.labels["weak_pool"][:, 0]
        labeled = tested[labels[tested] >= 0]
        values = sparse_mrr(ranked[labeled], prepared.documents[labeled, labels[labeled]])
        for item, value in zip(labeled.tolist(), values, strict=True):
            yield _row(model, name, "sparse_mrr@10", seed, _short(value)) | {"item": item}


def condensed(frame: pd.DataFrame, params: Params) -> pd.DataFrame:
    """With means over queries in the place of what no claim looks at by query, which would be most of the table."""
    given = isinstance(params.corpus, MSMarco)
    kept = frame.metric.eq("ndcg@10") | (frame.metric.eq("mrr@10") & given)
    kept |= frame.metric.eq("sparse_mrr@10") & frame.model.isin(SPARSELY_JUDGED)
    kept &= ~frame.dataset.isin([name for name, experiment in params.experiments.items() if not experiment.by_query])
    averaged = frame[frame.metric.isin(BY_QUERY) & ~kept]
    means = averaged.groupby(["model", "dataset", "metric", "seed"], as_index=False).value.mean()
    return pd.concat([frame.drop(averaged.index), means], ignore_index=True)


def sparse_mrr(ranked: NDArray[np.int64], label: NDArray[np.int64], depth: int = 10) -> NDArray[np.float64]:
    """Reciprocal rank of each query's one label [Q] among the first `depth` of its ranking [Q, R], else 0."""
    hits = ranked[:, :depth] == label[:, None]
    return np.where(hits.any(axis=1), 1 / (1 + hits.argmax(axis=1)), 0.0)


def _datasets(
    prepared: Prepared, name: str, groups: NDArray[np.int64], given: bool
) -> list[tuple[str, NDArray[np.bool_]]]:
    """Data sets of scores.csv and their queries: the experiment's, or every test set of MS MARCO."""
    if not given:
        return [(name, np.ones(len(groups), bool))]
    return [(prepared.groups[group], groups == group) for group in np.unique(groups)]


def retrievers(params: Params, prepared: Prepared) -> Iterator[Row]:
    """Every retriever's own order of its own top documents, and how far it is ahead of BM25 in nDCG@10."""
    tested = held_out_queries(params, prepared)
    for name, experiment in params.experiments.items():
        if not experiment.by_query:
            continue
        means = {}
        for retriever, documents in prepared.retrieved.items():
            rows = list(ranking_rows(params, prepared, name, retriever, 0, np.asarray(documents), tested))
            yield from rows
            means[retriever] = np.mean([row["value"] for row in rows if row["metric"] == "ndcg@10"])
        if "bm25" in means:
            for retriever, value in means.items():
                yield _row(retriever, name, "gain_over_bm25", 0, value - means["bm25"])


# --- What is behind them ----------------------------------------------------------------------------------------------


def diagnosis_rows(
    model: str, dataset: str, seed: int, histories: list[dict[str, list[float]]], *, by_epoch: bool
) -> Iterator[Row]:
    """Losses and diagnoses of a seed, means over folds: at the end of training, and by epoch."""
    for metric in histories[0]:
        values = np.array([history[metric] for history in histories], dtype=float)
        counted = np.isfinite(values).sum(axis=0)
        means = np.nansum(values, axis=0) / np.maximum(counted, 1)
        whose = f"selection_{model}" if metric == "pool_correlation_of_selection" else model
        known_as = "pool_correlation" if metric == "pool_correlation_of_selection" else metric
        if counted[-1]:
            yield _row(whose, dataset, known_as, seed, means[-1])
        for epoch in np.flatnonzero(counted) if by_epoch and metric in BY_EPOCH else ():
            yield _row(whose, dataset, known_as, seed, _short(means[epoch])) | {"epoch": int(epoch) + 1}


def false_negatives(params: Params, prepared: Prepared) -> Iterator[Row]:
    """The share of relevant documents among what negatives are drawn from: exact, of all labeled queries."""
    for name, experiment in params.experiments.items():
        if experiment.labels == "given" or not experiment.by_query:
            continue
        labeled = prepared.labels[experiment.labels][:, 0] >= 0
        for source in SOURCES:
            candidates = usable(prepared, experiment.labels, source)
            false = candidates & relevance_of(prepared, source)
            share = false.sum(axis=1) / np.maximum(candidates.sum(axis=1), 1)
            yield _row(source, name, "false_negatives", 0, share[labeled].mean())
            for group, collection in enumerate(prepared.groups if len(prepared.groups) > 1 else ()):
                value = share[labeled & (prepared.group == group)].mean()
                yield _row(source, name, "false_negatives", 0, value) | {"collection": collection}


def harm(frame: pd.DataFrame) -> Iterator[Row]:
    """By how much the ranker is worse with the strong retriever's negatives than with the weak one's, by query.

    Of every experiment that has both; its name stands where models do. `no_false_negatives` has the labels of
    `weak_pool` and the oracle's negatives.
    """
    for variant, known_as in (("plain", None), ("oracle", "no_false_negatives")):
        weak, strong = f"{variant}_weak", f"{variant}_strong"
        scores = frame[frame.metric.eq("ndcg@10") & frame.model.isin([weak, strong])]
        table = scores.pivot_table(index=["dataset", "seed", "item"], columns="model", values="value")
        if {weak, strong} <= set(table.columns):
            difference = (table[weak] - table[strong]).dropna()
            for (experiment, seed, item), value in difference.items():
                yield _row(known_as or experiment, HARM, "harm", seed, round(value, DIGITS)) | {"item": item}


def permutation_tests(frame: pd.DataFrame) -> Iterator[Row]:
    """p-values of paired permutation tests over queries: each variant against the unweighted ranker, same negatives."""
    scores = frame[frame.metric.eq("ndcg@10") & frame.item.notna()]
    for dataset, rows in scores.groupby("dataset"):
        tables = {
            model: each.pivot(index="seed", columns="item", values="value") for model, each in rows.groupby("model")
        }
        for model, table in tables.items():
            variant, _, source = model.rpartition("_")
            plain = tables.get(f"plain_{source}")
            if plain is not None and variant not in ("", "plain"):
                value = paired_permutation_test((table - plain).to_numpy())
                yield _row(model, dataset, "p_against_plain", 0, value)


def track_scores(stage: Stage[Params], frame: pd.DataFrame) -> None:
    """Add each model's mean test scores to the run that trained it, as `test/ndcg@10` and so on."""
    chosen = frame[frame.metric.isin([*METRICS, "sparse_mrr@10"])]
    means = chosen.groupby(["dataset", "model", "metric"]).value.mean()
    for name, experiment in stage.params.experiments.items():
        for model in experiment.trained():
            for members in member_groups(stage.params):
                record = run_folder(stage, name, model, members) / "run.json"
                if record.is_file() and (name, model) in means.index.droplevel(2):
                    with open_run(json.loads(record.read_text(encoding="utf-8"))["run_id"]) as run:
                        values = {f"test/{metric}": float(value) for metric, value in means[name, model].items()}
                        run.log(values, step=stage.params.training.epochs)


def _name(members: Sequence[Member]) -> str:
    return "all_members" if len(members) > 1 else f"fold{members[0].fold}"


def _short(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")


def _row(model: str, dataset: str, metric: str, seed: int, value: float) -> Row:
    return {"model": model, "dataset": dataset, "metric": metric, "seed": seed, "value": float(value)}
