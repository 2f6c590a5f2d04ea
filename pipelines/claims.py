"""What the scores say of a claim.

A check becomes comparisons, one a data set and model (or pair of models): an estimate with its 95 % bootstrap interval
over seeds and test items, held against the range that the claim allows. An interval inside the range holds, one outside
contradicts, one across its border is inconclusive. Claims are written before the figures are known, and nothing here
looks at what would come out.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from pipelines.papers import Beats, Check, Claim, Equals, Gate, Ratio, Threshold, Trend
from shared.config import Strict, UserError
from shared.evaluation.scores import further_columns, overall
from shared.evaluation.statistics import Interval, bootstrap_interval, paired_bootstrap, paired_effect_size

if TYPE_CHECKING:
    import pandas as pd

Outcome = Literal["holds", "contradicted", "inconclusive", "untested"]
OUTCOMES: tuple[Outcome, ...] = ("holds", "contradicted", "inconclusive", "untested")

# With fewer seeds or items an interval says more of its assumptions than of the model.
MIN_UNITS = 3
MIN_TREND_POINTS = 3


class Comparison(Strict):
    """One quantity that a claim is judged by: its interval, the range that the claim allows, and the outcome.

    `over` is the other model where there is one; `means` are those of each model; `effect_size` is Cohen's d_z of the
    paired differences.
    """

    kind: str
    metric: str
    dataset: str
    model: str
    over: str | None = None
    quantity: str | None = None
    estimate: float | None = None
    low: float | None = None
    high: float | None = None
    at_least: float | None = None
    at_most: float | None = None
    effect_size: float | None = None
    means: dict[str, float | None]
    seeds: int = 0
    items: int = 0
    verdict: Outcome
    reason: str


class ClaimVerdict(Strict):
    """What the scores of one profile say of one claim."""

    id: str
    headline: bool
    statement: str
    verdict: Outcome
    reason: str
    comparisons: tuple[Comparison, ...] = ()


@dataclass(frozen=True)
class _Sample:
    """Values of each side of a comparison, [seeds], [items] or [seeds, items], paired."""

    sides: tuple[NDArray[np.float64], ...]
    seeds: int
    items: int


@dataclass(frozen=True)
class _Quantity:
    """An estimated quantity and the range that the claim allows it; `strict` excludes the range's ends."""

    name: str
    interval: Interval
    at_least: float | None = None
    at_most: float | None = None
    strict: bool = False
    effect_size: float | None = None


class _NotJudged(Exception):
    """The scores do not allow a comparison; the message says why."""


def judge_claim(claim: Claim, scores: pd.DataFrame, profile: str) -> ClaimVerdict:
    """Hold a claim against the scores of a profile.

    `UserError` where the claim names a model, metric, data set or column that the scores do not have: it lists what is
    there.
    """
    comparisons: list[Comparison] = []
    try:
        reason = claim.untested or _out_of_profile(claim, profile) or _closed_gate(claim.gate, scores)
        if reason:
            verdict: Outcome = "untested"
        else:
            outcomes = []
            for check in claim.all_checks():
                compared = compare(check, scores)
                outcomes.append(combine([comparison.verdict for comparison in compared], check.require))
                comparisons += compared
            verdict, reason = combine(outcomes, "all"), _summary(comparisons)
    except UserError as error:
        raise UserError(f"claim {claim.id}: {error}") from None
    return ClaimVerdict(
        id=claim.id,
        headline=claim.headline,
        statement=claim.statement,
        verdict=verdict,
        reason=reason,
        comparisons=tuple(comparisons),
    )


def compare(check: Check, scores: pd.DataFrame) -> list[Comparison]:
    """All comparisons of a check; `UserError` for names that the scores do not have."""
    _assert_known(check, scores)
    return [_comparison(check, scores, dataset, models) for dataset in check.datasets for models in _subjects(check)]


def combine(outcomes: Sequence[Outcome], require: str) -> Outcome:
    """The outcome of several, of which `all`, `any` or a `majority` must hold.

    It is contradicted where what is required is out of reach, whatever the inconclusive ones would turn out to be.
    """
    needed = {"all": len(outcomes), "any": 1, "majority": len(outcomes) // 2 + 1}[require]
    if outcomes.count("holds") >= needed:
        return "holds"
    return "contradicted" if len(outcomes) - outcomes.count("contradicted") < needed else "inconclusive"


def range_text(at_least: float | None, at_most: float | None, *, strict: bool = False) -> str:
    """A range in words, such as `≥ 0.9 and ≤ 1.1`; `strict` leaves its ends out."""
    signs = ("> ", "< ") if strict else ("≥ ", "≤ ")
    bounds = zip(signs, (at_least, at_most), strict=True)
    return " and ".join(f"{sign}{bound:.4g}" for sign, bound in bounds if bound is not None)


def _out_of_profile(claim: Claim, profile: str) -> str | None:
    if claim.profiles and profile not in claim.profiles:
        return f"not part of profile {profile}; tested in {', '.join(claim.profiles)}"
    return None


def _closed_gate(gate: Gate | None, scores: pd.DataFrame) -> str | None:
    """Why the gate is closed; None where it is open or there is none."""
    if gate is None:
        return None
    for column in ("model", "metric", "dataset"):
        _assert_among(getattr(gate, column), scores[column], column)
    rows = overall(_select(scores, gate.metric, gate.dataset, gate.model))
    what = f"{gate.metric} of {gate.model} on {gate.dataset}"
    values = {what: rows["value"].mean(skipna=False)}
    if gate.every_seed:
        values = {f"{what}, seed {seed},": group.mean(skipna=False) for seed, group in rows.groupby("seed")["value"]}
    low = -math.inf if gate.at_least is None else gate.at_least
    high = math.inf if gate.at_most is None else gate.at_most
    for name, value in values.items():
        if not low <= value <= high:
            return f"gate not passed: {name} is {value:.3g}, needed is {range_text(gate.at_least, gate.at_most)}"
    return None


def _subjects(check: Check) -> list[tuple[str, ...]]:
    """The models of each comparison on a data set."""
    match check:
        case Beats():
            return list(check.all_pairs())
        case Ratio():
            return [(check.numerator, check.denominator)]
        case _:
            return [(model,) for model in check.model]


def _comparison(check: Check, scores: pd.DataFrame, dataset: str, models: tuple[str, ...]) -> Comparison:
    rows = [_rows(check, scores, dataset, model) for model in models]
    sample, quantity = None, None
    try:
        for model, table in zip(models, rows, strict=True):
            _assert_finite(check.metric, model, table)
        sample = _paired(check, models, rows)
        quantity = _quantity(check, models, sample)
        verdict, reason = _decide(quantity, certain=check.deterministic)
        scored = max(table["seed"].nunique() for table in rows)
        if sample.seeds < scored and not check.deterministic:
            reason += f" (of {scored} seeds, the {sample.seeds} that the models share)"
    except _NotJudged as problem:
        verdict, reason = "inconclusive", str(problem)
    estimated: dict[str, Any] = {}
    if quantity:
        estimated = {
            "quantity": quantity.name,
            "estimate": _rounded(quantity.interval.estimate),
            "low": _rounded(quantity.interval.low),
            "high": _rounded(quantity.interval.high),
            "at_least": quantity.at_least,
            "at_most": quantity.at_most,
            "effect_size": _rounded(quantity.effect_size),
        }
    return Comparison(
        kind=check.kind,
        metric=check.metric,
        dataset=dataset,
        model=models[0],
        over=models[1] if len(models) > 1 else None,
        means={model: _rounded(table["value"].mean(skipna=False)) for model, table in zip(models, rows, strict=True)},
        seeds=sample.seeds if sample else 0,
        items=sample.items if sample else 0,
        verdict=verdict,
        reason=reason,
        **estimated,
    )


# --- scores of a comparison ---


def _select(scores: pd.DataFrame, metric: str, dataset: str, model: str) -> pd.DataFrame:
    rows = scores[(scores["metric"] == metric) & (scores["dataset"] == dataset) & (scores["model"] == model)]
    if rows.empty:
        there = scores[scores["model"] == model][["metric", "dataset"]].drop_duplicates()
        pairs = "; ".join(f"{metric} on {dataset}" for metric, dataset in there.itertuples(index=False))
        raise UserError(f"scores.csv has no {metric} of {model} on {dataset}; of {model} it has {pairs}")
    return rows


def _rows(check: Check, scores: pd.DataFrame, dataset: str, model: str) -> pd.DataFrame:
    """The rows that a check takes of a model on a data set, reduced to seed, further columns in use, and value."""
    rows = _select(scores, check.metric, dataset, model)
    for column, entries in check.where.items():
        rows = rows[_matches(rows[column], entries)]
    if isinstance(check, Trend):
        rows = rows[rows[check.along].notna()]
    else:
        rows = overall(rows, chosen=tuple(check.where))
    if rows.empty:
        kept = ", ".join([*check.where, *([check.along] if isinstance(check, Trend) else [])])
        raise UserError(
            f"scores.csv has no {check.metric} of {model} on {dataset} with the entries asked for in {kept}"
        )
    return rows.drop(columns=["model", "dataset", "metric"]).dropna(axis=1, how="all")


def _matches(column: pd.Series, entries: Iterable[float | str]) -> pd.Series:
    return column.map(_entry_text).isin([_entry_text(entry) for entry in entries])


def _entry_text(entry: float | str) -> str:
    # A parameter such as 0.1 may have passed through single precision.
    return f"{entry:.6g}" if isinstance(entry, float) else str(entry)


def _assert_finite(metric: str, model: str, rows: pd.DataFrame) -> None:
    bad = rows[~np.isfinite(rows["value"])]
    if not bad.empty:
        seeds = ", ".join(str(seed) for seed in sorted(set(bad["seed"])))
        raise _NotJudged(f"{metric} of {model} is not a finite number in seed {seeds}")


def _paired(check: Check, models: tuple[str, ...], rows: Sequence[pd.DataFrame]) -> _Sample:
    """Join the models' rows on everything that they share, and reduce them to one value a seed and item."""
    table = _joined(check, models, rows)
    sides = list(range(len(models)))
    has_items = "item" in table and table["item"].notna().all()
    units = ["seed", "item"] if has_items else ["seed"]
    if isinstance(check, Trend):
        values = _trends(check, table, units)
    elif check.deterministic:
        _assert_one_value(check, models, table)
        values = table.groupby(units)[sides].first().iloc[:1]
    else:
        values = table.groupby(units)[sides].mean()
    seeds = values.index.get_level_values("seed").nunique()
    items = values.index.get_level_values("item").nunique() if has_items else 0
    if max(seeds, items) < MIN_UNITS and not check.deterministic:
        counted = f"{seeds} seed{'s' * (seeds != 1)}" + (f" and {items} test items" if has_items else "")
        raise _NotJudged(f"{counted}{' in common' * (len(models) > 1)}: a verdict needs at least {MIN_UNITS}")
    if len(values) == seeds * items:
        return _Sample(tuple(values[side].unstack("item").to_numpy() for side in sides), seeds, items)
    if has_items and seeds >= MIN_UNITS:
        # Each seed has items of its own, as in cross-validation: the seeds are the units.
        values = values.groupby(level="seed").mean()
    return _Sample(tuple(values[side].to_numpy() for side in sides), seeds, items)


def _joined(check: Check, models: tuple[str, ...], rows: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """The models' values side by side, in columns 0 and 1; seedless models stand beside every seed of the others."""
    with_seeds = [model for model in models if model not in check.seedless]
    tables = []
    for side, (model, table) in enumerate(zip(models, rows, strict=True)):
        table = table.rename(columns={"value": side})
        if model in check.seedless:
            if table["seed"].nunique() > 1:
                raise UserError(f"{model} is called seedless, but scores.csv has several seeds of it")
            table = table.drop(columns="seed") if with_seeds else table
        tables.append(table)
    joined = tables[0]
    for table in tables[1:]:
        keys = [column for column in table.columns if column in joined.columns]
        joined = joined.merge(table, on=keys) if keys else joined.merge(table, how="cross")
    if joined.empty:
        raise _NotJudged(f"{' and '.join(models)} have no seed in common")
    return joined


def _assert_one_value(check: Check, models: tuple[str, ...], table: pd.DataFrame) -> None:
    for side, model in enumerate(models):
        if table[side].nunique() > 1:
            raise UserError(
                f"{check.metric} of {model} is called deterministic, but scores.csv has different values of it, "
                f"{table[side].min():.6g} to {table[side].max():.6g}: leave 'deterministic' out"
            )


def _trends(check: Trend, table: pd.DataFrame, units: list[str]) -> pd.DataFrame:
    """One correlation or slope a unit, over the positions that all units have."""
    curves = table.groupby([*units, check.along])[0].mean().unstack(check.along).dropna(axis=1)
    positions = curves.columns.to_numpy(dtype=float)
    if len(positions) < MIN_TREND_POINTS:
        raise _NotJudged(
            f"a trend needs at least {MIN_TREND_POINTS} values of {check.along} that all seeds share; "
            f"there are {len(positions)}"
        )
    ordered = curves.rank(axis=1).to_numpy() if check.statistic == "spearman" else curves.to_numpy()
    # Positions come sorted and distinct, so that their ranks are their order.
    x = np.arange(len(positions), dtype=float) if check.statistic == "spearman" else positions
    x, y = x - x.mean(), ordered - ordered.mean(axis=1, keepdims=True)
    scale = np.sqrt((x**2).sum() * (y**2).sum(axis=1)) if check.statistic == "spearman" else (x**2).sum()
    # A curve without any change has no trend.
    trends = np.divide(y @ x, scale, out=np.zeros(len(y)), where=np.broadcast_to(scale, len(y)) > 0)
    return curves.assign(**{"trend": trends})[["trend"]].set_axis([0], axis=1)


# --- quantities and decisions ---


def _quantity(check: Check, models: tuple[str, ...], sample: _Sample) -> _Quantity:
    """What the check estimates from a sample, and the range it must lie in."""
    interval = _point if check.deterministic else bootstrap_interval
    match check:
        case Beats():
            return _improvement(check, models, sample)
        case Ratio():
            if any((side <= 0).any() for side in sample.sides):
                raise _NotJudged(f"a ratio needs positive values, and {check.metric} has others")
            return _Quantity("ratio", interval(*sample.sides), check.at_least, check.at_most)
        case Threshold():
            return _Quantity("mean", interval(*sample.sides), check.at_least, check.at_most)
        case Equals():
            tolerance = check.relative_tolerance * abs(check.value) if check.tolerance is None else check.tolerance
            return _Quantity("mean", interval(*sample.sides), check.value - tolerance, check.value + tolerance)
        case Trend():
            estimate = interval(*sample.sides)
            if check.statistic == "spearman":
                # Widening for few seeds knows nothing of a correlation's limits.
                estimate = Interval(estimate.estimate, max(estimate.low, -1.0), min(estimate.high, 1.0))
            bounds = (0.0, None) if check.direction == "increasing" else (None, 0.0)
            name = "Spearman correlation" if check.statistic == "spearman" else "slope"
            return _Quantity(f"{name} along {check.along}", estimate, *bounds, strict=True)


def _improvement(check: Beats, models: tuple[str, ...], sample: _Sample) -> _Quantity:
    """The mean difference as a share of the other model's mean, positive where the claimed one is better.

    The margin is taken off unit by unit, so that this is the paired test of "better by more than margin times the
    other's value", and is then added again to be seen as a share.
    """
    values, others = sample.sides
    differences = values - others if check.better == "higher" else others - values
    scale = float(np.abs(others).mean())
    if scale == 0:
        raise _NotJudged(f"{check.metric} of {models[1]} is 0, of which no improvement can be a share")
    beyond = (_point if check.deterministic else paired_bootstrap)(differences - check.margin * np.abs(others))
    shares = (bound / scale + check.margin for bound in (beyond.estimate, beyond.low, beyond.high))
    effect_size = None if check.deterministic else paired_effect_size(differences)
    return _Quantity("improvement", Interval(*shares), check.margin, strict=True, effect_size=effect_size)


def _point(values: NDArray[np.float64], denominator: NDArray[np.float64] | None = None) -> Interval:
    """A number without spread, as an interval."""
    value = float(values.mean() if denominator is None else values.mean() / denominator.mean())
    return Interval(value, value, value)


def _decide(quantity: _Quantity, *, certain: bool) -> tuple[Outcome, str]:
    """Hold an interval against its range; `certain` numbers have no spread and are on one side or the other."""
    interval = quantity.interval
    floor = -math.inf if quantity.at_least is None else quantity.at_least
    ceiling = math.inf if quantity.at_most is None else quantity.at_most
    inside = floor <= interval.low and interval.high <= ceiling
    if quantity.strict:
        inside = floor < interval.low and interval.high < ceiling
    outside = interval.high < floor or interval.low > ceiling or (certain and not inside)
    claimed = range_text(quantity.at_least, quantity.at_most, strict=quantity.strict)
    text = f"{quantity.name} {interval.estimate:.3g} [{interval.low:.3g}, {interval.high:.3g}], claimed {claimed}"
    return ("holds" if inside else "contradicted" if outside else "inconclusive"), text


def _summary(comparisons: Sequence[Comparison]) -> str:
    if len(comparisons) == 1:
        return comparisons[0].reason
    counts = [(outcome, sum(comparison.verdict == outcome for comparison in comparisons)) for outcome in OUTCOMES]
    return f"{len(comparisons)} comparisons: " + ", ".join(f"{count} {outcome}" for outcome, count in counts if count)


def _rounded(value: float | None) -> float | None:
    """Six digits: enough for a reader, few enough to be the same on machines that add up in another order."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.6g}")


# --- names that the scores do not have ---


def _assert_known(check: Check, scores: pd.DataFrame) -> None:
    _assert_among(check.metric, scores["metric"], "metric")
    for dataset in check.datasets:
        _assert_among(dataset, scores["dataset"], "dataset")
    for model in (*check.seedless, *(model for models in _subjects(check) for model in models)):
        _assert_among(model, scores["model"], "model")
    for column in (*check.where, *([check.along] if isinstance(check, Trend) else [])):
        _assert_among(column, further_columns(scores), "further column")
    for column, entries in check.where.items():
        for entry in entries:
            _assert_among(_entry_text(entry), scores[column].dropna().map(_entry_text), f"entry of {column}")
    if isinstance(check, Trend) and scores[check.along].dtype.kind not in "fi":
        raise UserError(f"a trend needs numbers along {check.along}, which has others")


def _assert_among(name: str, known: Iterable[str], what: str) -> None:
    names = sorted(set(known))
    if name not in names:
        close = difflib.get_close_matches(name, names, n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise UserError(f"scores.csv has no {what} {name!r}{hint}; it has {', '.join(names) or 'none'}")
