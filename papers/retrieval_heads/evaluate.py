"""What the scores of all heads say, and what masking them does: scores.csv, figures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from shared.config import Stage
from shared.evaluation.abilities import gate_rows
from shared.evaluation.scores import write_metrics, write_scores

from . import figures
from .config import Params
from .data import load_published
from .detect import load_scores, recorded
from .model import KINDS, THRESHOLD, activation_frequency, pearson, ranked, shares
from .subjects import house_models, model_folder

Array = NDArray[np.float64]
Row = dict[str, Any]
Samples = dict[tuple[str, int], Array]

TOP = (1, 2, 3)
RESAMPLES = 1000
OTHER_SEED = "other-seed"


def evaluate(stage: Stage[Params]) -> None:
    """Write scores.csv, costs.csv (times), metrics.json and figures."""
    params = stage.params
    rows: list[Row] = []
    samples: Samples = {}
    induction: dict[tuple[str, int], Array] = {}
    if params.published:
        samples |= {(name, 0): scores for name, scores in load_published(stage.data_dir).items()}
    for name, seed in [*_models(params)]:
        found = load_scores(stage, name, seed)
        samples[name, seed], induction[name, seed] = recorded(found), found["induction"]
        rows += detection_rows(name, seed, found)
    with_items = not params.house
    for (name, seed), scores in samples.items():
        rows += head_rows(name, seed, scores, with_items)
        rows += map_rows(name, seed, scores, induction[name, seed]) if (name, seed) in induction else []
    rows += correlation_rows(samples, params.test_groups if with_items else None)
    if params.house:
        rows += seed_correlation_rows(samples, params.house.models[0].name, params.seeds)
        for model, seed in house_models(stage):
            gates = gate_rows(model_folder(stage, model.name, seed), model=model.name)
            # Chance and the bigram model are those of the base's training data.
            rows += [row for row in gates if row["model"] == model.name or model is params.house.models[0]]
    answers = masked_answers(stage)
    if answers is not None:
        rows += masking_rows(answers)

    frame = pd.DataFrame(rows).drop_duplicates()
    write_scores(stage.results_dir / "scores.csv", frame)
    write_metrics(stage, frame, source(params))
    paths = figures.draw(stage, frame, samples, answers)
    if stage.run:
        stage.run.log_table(stage.results_dir / "scores.csv")
        for path in paths:
            stage.run.log_artifact(path, "figures")


def source(params: Params) -> str:
    """Where the scores come from, in a few words."""
    parts = []
    if params.published:
        parts.append("real: the authors' head scores of seven models")
    if params.checkpoints:
        parts.append("real: language models on novels")
    if params.house:
        parts.append(f"generated: codes among filler words; house models of size {params.house.size}")
    return "; ".join(parts)


def _models(params: Params) -> Iterator[tuple[str, int]]:
    """Names and seeds of the models whose heads were detected here."""
    for seed in params.seeds if params.house else ():
        yield from ((model.name, seed) for model in params.house.models)
    yield from ((model.name, 0) for model in (params.checkpoints.models if params.checkpoints else ()))


# --- Heads ------------------------------------------------------------------------------------------------------------


def head_rows(name: str, seed: int, scores: Array, with_interval: bool) -> Iterator[Row]:
    """Shares of heads, those that are always active, and how much of all copying the strongest do.

    Shares and counts are those of the recorded tests as they are, as in the paper. From `retrieval_share_low` to
    `retrieval_share_high` the share lies in the middle 95 % of bootstrap samples of the tests. `…_in_copying_tests`
    leaves out tests in which no head copied anything, though the answer was right.
    """
    common = {"model": name, "dataset": "heads", "seed": seed}
    mean, frequency = scores.mean(axis=0), activation_frequency(scores)
    copying = scores[(scores > 0).any(axis=(1, 2))]
    values = {
        **shares(mean),
        "heads": mean.size,
        "retrieval_heads": int((mean >= THRESHOLD).sum()),
        "recorded_tests": len(scores),
        "copying_tests": len(copying),
        "always_active": int((frequency == 1).sum()),
        "active_in_99_percent": int((frequency >= 0.99).sum()),
        "active_in_95_percent": int((frequency >= 0.95).sum()),
    }
    if len(copying):
        values["always_active_in_copying_tests"] = int((activation_frequency(copying) == 1).sum())
    if with_interval:
        values["retrieval_share_low"], values["retrieval_share_high"] = share_interval(scores)
    yield from ({**common, "metric": metric, "value": value} for metric, value in values.items())
    if mean.sum() > 0:
        strongest = np.sort(mean.ravel())[::-1].cumsum() / mean.sum()
        yield from ({**common, "metric": "score_held_by_top", "top": top, "value": strongest[top - 1]} for top in TOP)


def map_rows(name: str, seed: int, scores: Array, induction: Array) -> Iterator[Row]:
    """Every head's scores, and how far retrieval heads are induction heads."""
    common = {"model": name, "seed": seed}
    maps = {
        "retrieval_score": scores.mean(axis=0),
        "activation_frequency": activation_frequency(scores),
        "induction_score": induction,
    }
    for metric, values in maps.items():
        for (layer, head), value in np.ndenumerate(values):
            yield {**common, "dataset": "head", "metric": metric, "layer": layer, "head": head, "value": value}
    by_score, by_induction = ranked(maps["retrieval_score"]), ranked(induction)
    for top in TOP:
        shared = len(set(by_score[:top]) & set(by_induction[:top])) / top
        yield {**common, "dataset": "heads", "metric": "shared_with_induction", "top": top, "value": shared}


def detection_rows(name: str, seed: int, found: Mapping[str, NDArray]) -> Iterator[Row]:
    """Recall without any masking, in per cent, overall and by length and depth; the code's score beside the paper's."""
    common = {"model": name, "dataset": "detection", "seed": seed}
    yield {**common, "metric": "recall", "value": 100 * found["recall"].mean()}
    cells = pd.DataFrame({key: found[key] for key in ("length", "depth", "recall")}).groupby(["length", "depth"])
    for (length, depth), value in cells["recall"].mean().items():
        yield {**common, "metric": "recall", "length": length, "depth": depth, "value": 100 * value}
    paper, code = (recorded(dict(found), which).mean(axis=0) for which in ("score", "counted"))
    yield {**common, "metric": "largest_difference_of_scores", "value": float(np.abs(paper - code).max())}


def share_interval(scores: Array) -> tuple[float, float]:
    """The share of retrieval heads in bootstrap samples of the tests [tests, L, H]: 2.5 and 97.5 per cent quantiles."""
    draws = np.random.default_rng(0).multinomial(len(scores), np.full(len(scores), 1 / len(scores)), size=RESAMPLES)
    means = draws @ scores.reshape(len(scores), -1) / len(scores)
    low, high = np.quantile((means >= THRESHOLD).mean(axis=1), (0.025, 0.975))
    return float(low), float(high)


def pseudo_values(samples: list[Array], statistic: Callable[[list[Array]], float], groups: int) -> Array:
    """Pseudo-values [G] of a statistic of mean maps, G θ - (G - 1) θ_g, with θ_g without the g-th group of tests.

    Their mean and its spread are those of θ over tests (the grouped jackknife; Tukey 1958), where θ is smooth, which
    shares by a threshold are not. Tests [tests, L, H] are put into groups at random; several samples lose a group each
    at a time, which is right for samples that are independent.
    """
    parts = []
    for number, tests in enumerate(samples):
        order = np.random.default_rng(number).permutation(len(tests))
        sums = np.stack([tests[chosen].sum(axis=0) for chosen in np.array_split(order, groups)])
        sizes = np.array([len(chosen) for chosen in np.array_split(order, groups)])[:, None, None]
        parts.append((sums.sum(axis=0) - sums) / (len(tests) - sizes))
    whole = statistic([tests.mean(axis=0) for tests in samples])
    without = np.array([statistic([part[group] for part in parts]) for group in range(groups)])
    return groups * whole - (groups - 1) * without


# --- Correlations -----------------------------------------------------------------------------------------------------


def correlation_rows(samples: Samples, groups: int | None) -> Iterator[Row]:
    """Pearson's r between the score maps of all pairs of models that have heads alike, seed by seed."""
    for ((one, seed), first), ((other, same), second) in combinations(samples.items(), 2):
        if seed != same or first.shape[1:] != second.shape[1:]:
            continue
        common = {"model": f"{one}~{other}", "dataset": "correlation", "metric": "pearson", "seed": seed}
        value = pearson(first.mean(axis=0), second.mean(axis=0))
        if value is None:
            continue
        if groups and min(len(first), len(second)) >= groups:
            values = pseudo_values([first, second], lambda maps: pearson(*maps) or 0.0, groups)
            yield from ({**common, "item": item, "value": v} for item, v in enumerate(values))
        else:
            yield {**common, "value": value}


def seed_correlation_rows(samples: Samples, base: str, seeds: tuple[int, ...]) -> Iterator[Row]:
    """The same between each seed of the base and the next one; the last one's next is the first."""
    for seed, following in zip(seeds, (*seeds[1:], seeds[0]), strict=True):
        value = pearson(samples[base, seed].mean(axis=0), samples[base, following].mean(axis=0))
        if value is not None and seed != following:
            yield {"model": OTHER_SEED, "dataset": "correlation", "metric": "pearson", "seed": seed, "value": value}


# --- Masking ----------------------------------------------------------------------------------------------------------


def masked_answers(stage: Stage[Params]) -> pd.DataFrame | None:
    """Everything that `mask` measured, with columns `subject` and `seed`; None where nothing was masked."""
    if stage.params.masking is None:
        return None
    tables = []
    for name, seed in _models(stage.params):
        table = pd.read_csv(stage.runs_dir / "mask" / f"{name}-seed{seed}.csv")
        tables.append(table.assign(subject=name, seed=seed))
    return pd.concat(tables, ignore_index=True)


def masking_rows(answers: pd.DataFrame) -> Iterator[Row]:
    """Means over tests and draws, each draw's, and those by length and depth; of checkpoints, one a test."""
    needles = answers[answers["task"].eq("needle")]
    metrics = ["recall", "exact_match", *KINDS]
    by_item = needles["item"].notna().any()
    keys = ["model", "subject", "mode", "masked", "seed"]
    for key, group in needles.groupby(keys, sort=True):
        common = _named(key)
        cells = ["length", "depth", "item"] if by_item else []
        parts = group.groupby(cells) if cells else [((), group)]
        for number, (_, part) in enumerate(parts):
            where = {"item": number} if by_item else {}
            means = {metric: _weighted(part, metric) for metric in metrics}
            means["incomplete_of_errors"] = _of_errors(means)
            for metric, value in means.items():
                if value is not None:
                    scale = 100 if metric == "recall" else 1
                    yield {**common, **where, "metric": metric, "value": scale * value}
        for draw, part in group.dropna(subset=["draw"]).groupby("draw"):
            yield {**common, "metric": "recall_of_draw", "draw": int(draw), "value": 100 * _weighted(part, "recall")}
        if key[2] == "uniform" and not by_item:
            for (length, depth), part in group.groupby(["length", "depth"]):
                value = 100 * _weighted(part, "recall")
                yield {**common, "metric": "recall_of_cell", "length": length, "depth": depth, "value": value}
    others = answers[~answers["task"].eq("needle")]
    unmasked = others[others["model"].eq("unmasked")].set_index(["task", "mode", "seed"]).T
    for (model, task, mode, masked, seed), group in others.groupby(["model", "task", "mode", "masked", "seed"]):
        metric = "legal_words" if task == "filler" else "accuracy"
        common = {"model": model, "dataset": f"{task}/{mode}", "masked": masked, "seed": seed}
        value, whole = group[metric].mean(), unmasked[task, mode, seed][metric]
        yield {**common, "metric": metric, "value": value}
        if whole > 0:
            yield {**common, "metric": f"{metric}_kept", "value": value / whole}


def _named(key: tuple[Any, ...]) -> Row:
    model, subject, mode, masked, seed = key
    return {"model": model, "dataset": f"{subject}/{mode}", "masked": int(masked), "seed": int(seed)}


def _weighted(rows: pd.DataFrame, metric: str) -> float | None:
    """Mean over tests; None where the metric was not measured."""
    measured = rows.dropna(subset=[metric])
    return None if measured.empty else float(np.average(measured[metric], weights=measured["tests"]))


def _of_errors(means: Mapping[str, float | None]) -> float | None:
    """Share of errors that are incomplete answers; None without errors."""
    errors = [value for kind in KINDS if kind != "complete" and (value := means[kind]) is not None]
    return means["incomplete"] / total if (total := sum(errors)) > 0 else None
