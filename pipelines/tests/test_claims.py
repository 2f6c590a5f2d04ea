from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest

from pipelines.claims import ClaimVerdict, Comparison, combine, judge_claim
from pipelines.papers import Claim
from shared.config import UserError
from shared.evaluation.statistics import paired_bootstrap


def scores(values: dict[str, Any], metric: str = "error", dataset: str = "test") -> pd.DataFrame:
    """Scores of models by seed."""
    rows = [
        (model, dataset, metric, seed, float(value))
        for model, seeds in values.items()
        for seed, value in enumerate(np.atleast_1d(seeds))
    ]
    return pd.DataFrame(rows, columns=["model", "dataset", "metric", "seed", "value"])


def items(model: str, values: np.ndarray, metric: str = "error") -> pd.DataFrame:
    """Scores of a model by seed and item, [seeds, items]."""
    rows = [(model, "test", metric, seed, value, item) for (seed, item), value in np.ndenumerate(values)]
    return pd.DataFrame(rows, columns=["model", "dataset", "metric", "seed", "value", "item"])


def curves(values: dict[str, list[list[float]]], positions: list[float]) -> pd.DataFrame:
    """Scores of models by seed and length."""
    rows = [
        (model, "test", "error", seed, value, length)
        for model, seeds in values.items()
        for seed, curve in enumerate(seeds)
        for length, value in zip(positions, curve, strict=True)
    ]
    return pd.DataFrame(rows, columns=["model", "dataset", "metric", "seed", "value", "length"])


def check(kind: str, **settings: Any) -> dict[str, Any]:
    return {"kind": kind, "metric": "error", "datasets": ["test"]} | settings


def judge(frame: pd.DataFrame, *checks: dict[str, Any], profile: str = "small", **settings: Any) -> ClaimVerdict:
    claim = {"id": "C1", "statement": "x", "place": "x", "figures": "x", "mark": "read", "checks": list(checks)}
    return judge_claim(Claim.model_validate(claim | settings), frame, profile)


def only(verdict: ClaimVerdict) -> Comparison:
    (comparison,) = verdict.comparisons
    return comparison


BEATS = check("beats", better="lower", model="ours", over="base")


# --- beats ---


@pytest.mark.parametrize(
    ("ours", "expected"),
    [([1.0, 1.1, 0.9], "holds"), ([3.0, 3.1, 2.9], "contradicted"), ([1.0, 3.0, 2.1], "inconclusive")],
)
def test_beats(ours: list[float], expected: str) -> None:
    frame = scores({"ours": ours, "base": [2.0, 2.1, 1.9]})
    assert judge(frame, BEATS).verdict == expected
    flipped = {"holds": "contradicted", "contradicted": "holds"}
    higher = judge(frame, BEATS | {"better": "higher"})
    assert higher.verdict == flipped.get(expected, expected)


def test_beats_shows_the_paired_improvement() -> None:
    ours, base = np.array([1.0, 1.2, 1.1]), np.array([2.0, 2.1, 2.2])
    comparison = only(judge(scores({"ours": ours, "base": base}), BEATS))
    interval = paired_bootstrap(base - ours)
    assert comparison.estimate == pytest.approx(interval.estimate / 2.1, rel=1e-5)
    assert comparison.low == pytest.approx(interval.low / 2.1, rel=1e-5)
    assert comparison.high == pytest.approx(interval.high / 2.1, rel=1e-5)
    assert comparison.means == {"ours": 1.1, "base": 2.1}
    assert (comparison.seeds, comparison.items, comparison.over) == (3, 0, "base")
    # Differences 1.0, 0.9, 1.1: mean 1, standard deviation 0.1.
    assert comparison.effect_size == pytest.approx(10)


def test_pairing_by_seed_finds_what_the_spread_over_seeds_would_hide() -> None:
    base = np.array([1.0, 5.0, 9.0, 13.0])
    assert judge(scores({"ours": base - [0.5, 0.45, 0.55, 0.5], "base": base}), BEATS).verdict == "holds"


@pytest.mark.parametrize(("margin", "expected"), [(0.4, "holds"), (0.5, "inconclusive"), (0.6, "contradicted")])
def test_beats_by_a_margin(margin: float, expected: str) -> None:
    frame = scores({"ours": [1.0, 1.02, 0.98], "base": [2.0, 2.0, 2.0]})
    verdict = judge(frame, BEATS | {"margin": margin})
    assert verdict.verdict == expected
    assert only(verdict).estimate == pytest.approx(0.5)


def test_agreement_of_three_noisy_seeds_is_no_proof() -> None:
    assert judge(scores({"ours": [1.0, 1.9, 1.2], "base": [2.0, 2.0, 2.0]}), BEATS).verdict == "inconclusive"


def test_equal_models_do_not_beat_each_other() -> None:
    frame = scores({"ours": [1.0, 1.0, 1.0], "base": [1.0, 1.0, 1.0]})
    assert judge(frame, BEATS).verdict == "inconclusive"
    assert judge(frame, BEATS | {"deterministic": True}).verdict == "contradicted"


def test_lists_and_pairs() -> None:
    frame = scores({"a": [1, 1, 1], "b": [1.5, 1.5, 1.5], "c": [2, 2, 2]})
    listed = judge(frame, check("beats", better="lower", model=["a", "b"], over=["c"]))
    paired = judge(
        frame, check("beats", better="lower", pairs=[{"model": "a", "over": "c"}, {"model": "b", "over": "c"}])
    )
    assert listed == paired
    assert [(c.model, c.over) for c in listed.comparisons] == [("a", "c"), ("b", "c")]
    assert listed.reason == "2 comparisons: 2 holds"


# --- the other checks ---


@pytest.mark.parametrize(
    ("bounds", "expected"),
    [
        ({"at_most": 1.3}, "holds"),
        ({"at_least": 1.1, "at_most": 1.3}, "holds"),
        ({"at_most": 1.0}, "contradicted"),
        ({"at_least": 1.2}, "inconclusive"),
    ],
)
def test_ratio(bounds: dict[str, float], expected: str) -> None:
    frame = scores({"ours": [1.19, 1.21, 1.2], "base": [1.0, 1.0, 1.0]})
    verdict = judge(frame, check("ratio", numerator="ours", denominator="base", **bounds))
    assert verdict.verdict == expected
    assert only(verdict).estimate == pytest.approx(1.2)


def test_ratio_of_values_that_are_not_positive_is_open() -> None:
    frame = scores({"ours": [1, 2, 3], "base": [1, 0, 1]})
    verdict = judge(frame, check("ratio", numerator="ours", denominator="base", at_most=1))
    assert (verdict.verdict, "positive" in verdict.reason) == ("inconclusive", True)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"value": 1.0, "tolerance": 0.1}, "holds"),
        ({"value": 100, "relative_tolerance": 1.0}, "holds"),
        ({"value": 2.0, "tolerance": 0.1}, "contradicted"),
        ({"value": 1.0, "tolerance": 0.01}, "inconclusive"),
    ],
)
def test_equals(settings: dict[str, float], expected: str) -> None:
    frame = scores({"ours": [0.99, 1.01, 1.0]})
    assert judge(frame, check("equals", model="ours", **settings)).verdict == expected


@pytest.mark.parametrize(
    ("bounds", "expected"),
    [({"at_least": 0.9}, "holds"), ({"at_most": 0.9}, "contradicted"), ({"at_most": 1.0}, "inconclusive")],
)
def test_threshold(bounds: dict[str, float], expected: str) -> None:
    assert judge(scores({"ours": [0.99, 1.01, 1.0]}), check("threshold", model="ours", **bounds)).verdict == expected


@pytest.mark.parametrize("statistic", ["spearman", "slope"])
@pytest.mark.parametrize(
    ("seeds", "expected"),
    [
        ([[1, 2, 3, 5], [1, 2, 4, 5], [2, 3, 4, 6]], "holds"),
        ([[5, 3, 2, 1], [5, 4, 2, 1], [6, 4, 3, 2]], "contradicted"),
        ([[1, 2, 3, 4], [4, 3, 2, 1], [1, 3, 2, 4]], "inconclusive"),
        ([[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]], "inconclusive"),
    ],
)
def test_trend(statistic: str, seeds: list[list[float]], expected: str) -> None:
    frame = curves({"ours": seeds}, [1, 2, 4, 8])
    rising = check("trend", model="ours", along="length", direction="increasing", statistic=statistic)
    assert judge(frame, rising).verdict == expected
    falling = judge(frame, rising | {"direction": "decreasing"}).verdict
    assert falling == {"holds": "contradicted", "contradicted": "holds"}.get(expected, expected)


def test_trend_statistics_by_hand() -> None:
    frame = curves({"ours": [[1, 3, 2, 4]] * 3}, [0, 1, 2, 10])
    trend = check("trend", model="ours", along="length", direction="increasing")
    # Rank differences 0, 1, 1, 0: 1 - 6 * 2 / (4 * 15).
    assert only(judge(frame, trend)).estimate == pytest.approx(0.8)
    # Sum of (x - 3.25)(y - 2.5) over sum of (x - 3.25)^2 = 14.5 / 62.75.
    slope = only(judge(frame, trend | {"statistic": "slope"}))
    assert slope.estimate == pytest.approx(14.5 / 62.75, rel=1e-5)


def test_trend_needs_points_and_numbers() -> None:
    trend = check("trend", model="ours", along="length", direction="increasing")
    two = judge(curves({"ours": [[1, 2]] * 3}, [1, 2]), trend)
    assert (two.verdict, "at least 3 values of length" in two.reason) == ("inconclusive", True)
    words = curves({"ours": [[1, 2, 3]] * 3}, [1, 2, 3]).assign(length=["a", "b", "c"] * 3)
    with pytest.raises(UserError, match="numbers along length"):
        judge(words, trend)


# --- seeds, items, spread ---


def test_fewer_than_three_seeds_decide_nothing() -> None:
    verdict = judge(scores({"ours": [1.0, 1.0], "base": [2.0, 2.0]}), BEATS)
    assert verdict.verdict == "inconclusive"
    assert verdict.reason == "2 seeds in common: a verdict needs at least 3"


def test_items_stand_in_for_seeds() -> None:
    generator = np.random.default_rng(0)
    base = generator.normal(2.0, 0.5, size=(1, 50))
    frame = pd.concat([items("base", base), items("ours", base - 0.2 + generator.normal(0, 0.1, size=(1, 50)))])
    verdict = judge(frame, BEATS)
    assert verdict.verdict == "holds"
    assert (only(verdict).seeds, only(verdict).items) == (1, 50)


def test_seeds_and_items_are_crossed() -> None:
    generator = np.random.default_rng(1)
    # Each seed is far from the others, so that three of them decide little however many items there are.
    base = generator.normal(2.0, 0.1, size=(3, 200))
    ours = base - np.array([[0.9], [0.1], [0.05]])
    verdict = judge(pd.concat([items("base", base), items("ours", ours)]), BEATS)
    assert (verdict.verdict, only(verdict).seeds, only(verdict).items) == ("inconclusive", 3, 200)


def test_items_of_their_own_make_seeds_the_units() -> None:
    frames = []
    for model, level in (("base", 2.0), ("ours", 1.0)):
        frame = items(model, np.full((3, 6), level) + np.arange(3)[:, None] / 100)
        frames.append(frame.assign(item=frame["item"] + 6 * frame["seed"]))
    verdict = judge(pd.concat(frames), BEATS)
    assert (verdict.verdict, only(verdict).seeds) == ("holds", 3)


def test_only_shared_seeds_count_and_it_says_so() -> None:
    verdict = judge(scores({"ours": [1.0, 1.1, 0.9, 50.0], "base": [2.0, 2.1, 1.9]}), BEATS)
    assert verdict.verdict == "holds"
    assert "of 4 seeds, the 3 that the models share" in verdict.reason
    disjoint = scores({"ours": [1.0, 1.1], "base": [2.0, 2.0]})
    disjoint.loc[disjoint["model"] == "base", "seed"] += 5
    assert "no seed in common" in judge(disjoint, BEATS).reason


def test_seedless_models_stand_beside_every_seed() -> None:
    frame = scores({"ours": [1.0, 1.1, 0.9], "base": 2.0})
    assert judge(frame, BEATS).verdict == "inconclusive"
    assert judge(frame, BEATS | {"seedless": "base"}).verdict == "holds"
    with pytest.raises(UserError, match="several seeds"):
        judge(frame, BEATS | {"seedless": "ours"})


def test_deterministic_numbers_are_compared_as_they_are() -> None:
    frame = scores({"ours": 0.1, "base": 0.3}, metric="parameters")
    smaller = BEATS | {"metric": "parameters", "deterministic": True}
    assert judge(frame, smaller).verdict == "holds"
    ratio = check("ratio", metric="parameters", numerator="base", denominator="ours", deterministic=True)
    assert judge(frame, ratio | {"at_least": 2.9, "at_most": 3.1}).verdict == "holds"
    assert judge(frame, ratio | {"at_most": 2.9}).verdict == "contradicted"
    equals = check("equals", metric="parameters", model="ours", value=0.1, tolerance=0, deterministic=True)
    assert judge(frame, equals).verdict == "holds"
    repeated = scores({"ours": [0.1, 0.1, 0.1]}, metric="parameters")
    assert judge(repeated, equals).verdict == "holds"
    with pytest.raises(UserError, match="called deterministic"):
        judge(scores({"ours": [0.1, 0.2]}, metric="parameters"), equals)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("model", ["ours", "base"])
def test_values_that_are_not_finite_never_decide(model: str, value: float) -> None:
    frame = scores({"ours": [1.0, 1.1, 0.9], "base": [2.0, 2.1, 1.9]})
    frame.loc[(frame["model"] == model) & (frame["seed"] == 1), "value"] = value
    for better in ("lower", "higher"):
        verdict = judge(frame, BEATS | {"better": better})
        assert verdict.verdict == "inconclusive"
        assert verdict.reason == f"error of {model} is not a finite number in seed 1"
        assert only(verdict).means[model] is None


# --- rows ---


def test_where_keeps_rows_by_number_or_text() -> None:
    frame = curves({"ours": [[1.0, 9.0]] * 3, "base": [[2.0, 3.0]] * 3}, [0.1, 0.7])
    frame["split"] = np.where(frame["length"] == 0.1, "near", "far")
    assert judge(frame, BEATS | {"where": {"length": 0.1}}).verdict == "holds"
    assert judge(frame, BEATS | {"where": {"split": "near"}}).verdict == "holds"
    assert judge(frame, BEATS | {"where": {"length": float(np.float32(0.7))}}).verdict == "contradicted"
    assert judge(frame, BEATS).verdict == "contradicted"
    with pytest.raises(UserError, match=r"no entry of length '0\.3'.*; it has 0\.1, 0\.7"):
        judge(frame, BEATS | {"where": {"length": 0.3}})
    with pytest.raises(UserError, match="no further column 'spilt' \\(did you mean split\\?\\)"):
        judge(frame, BEATS | {"where": {"spilt": "near"}})


def test_rows_of_curves_do_not_count_beside_the_whole() -> None:
    whole = scores({"ours": [1.0, 1.0, 1.0], "base": [2.0, 2.0, 2.0]})
    frame = pd.concat([whole, curves({"ours": [[90.0]] * 3, "base": [[1.0]] * 3}, [5])])
    assert only(judge(frame, BEATS)).means == {"ours": 1.0, "base": 2.0}


# --- combining, profiles, gates ---


@pytest.mark.parametrize(
    ("outcomes", "expected"),
    [
        ("hhh", {"all": "holds", "any": "holds", "majority": "holds"}),
        ("hhc", {"all": "contradicted", "any": "holds", "majority": "holds"}),
        ("hhi", {"all": "inconclusive", "any": "holds", "majority": "holds"}),
        ("hci", {"all": "contradicted", "any": "holds", "majority": "inconclusive"}),
        ("cci", {"all": "contradicted", "any": "inconclusive", "majority": "contradicted"}),
        ("ccc", {"all": "contradicted", "any": "contradicted", "majority": "contradicted"}),
        ("hc", {"all": "contradicted", "any": "holds", "majority": "contradicted"}),
    ],
)
def test_combining(outcomes: str, expected: dict[str, str]) -> None:
    words = {"h": "holds", "c": "contradicted", "i": "inconclusive"}
    for require, outcome in expected.items():
        assert combine([words[letter] for letter in outcomes], require) == outcome


def test_all_checks_of_a_claim_must_hold() -> None:
    frame = scores({"ours": [1.0, 1.1, 0.9], "base": [2.0, 2.1, 1.9]})
    low = check("threshold", model="ours", at_most=0.5)
    assert judge(frame, BEATS).verdict == "holds"
    assert judge(frame, BEATS, low).verdict == "contradicted"


def test_untested_claims_say_why() -> None:
    frame = scores({"ours": [1.0, 1.1, 0.9], "base": [2.0, 2.1, 1.9]})
    assert judge(frame, checks=[], untested="needs a robot").reason == "needs a robot"
    elsewhere = judge(frame, BEATS | {"datasets": ["2d"]}, profiles=["gpu", "paper"])
    assert (elsewhere.verdict, elsewhere.comparisons) == ("untested", ())
    assert elsewhere.reason == "not part of profile small; tested in gpu, paper"
    assert judge(frame, BEATS, profiles=["small"]).verdict == "holds"


@pytest.mark.parametrize(
    ("bounds", "expected"),
    [({"at_most": 2.5}, "holds"), ({"at_most": 1.5}, "untested"), ({"at_least": 2.5}, "untested")],
)
def test_gates(bounds: dict[str, float], expected: str) -> None:
    frame = scores({"ours": [1.0, 1.1, 0.9], "base": [2.0, 2.1, 1.9]})
    verdict = judge(frame, BEATS, gate={"metric": "error", "model": "base", "dataset": "test"} | bounds)
    assert verdict.verdict == expected
    if expected == "untested":
        assert "error of base on test is 2, needed is" in verdict.reason


def test_a_gate_for_every_seed_is_closed_by_one() -> None:
    frame = scores({"ours": [1.0, 1.1, 0.9], "base": [2.0, 2.1, 1.9]})
    gate = {"metric": "error", "model": "base", "dataset": "test", "at_most": 2.05}
    assert judge(frame, BEATS, gate=gate).verdict == "holds"
    verdict = judge(frame, BEATS, gate=gate | {"every_seed": True})
    assert verdict.reason == "gate not passed: error of base on test, seed 1, is 2.1, needed is ≤ 2.05"
    assert judge(frame, BEATS, gate=gate | {"every_seed": True, "at_most": 2.1}).verdict == "holds"


def test_a_gate_that_diverged_is_closed() -> None:
    frame = scores({"ours": [1.0, 1.1, 0.9], "base": [2.0, 2.1, math.nan]})
    gate = {"metric": "error", "model": "base", "dataset": "test", "at_most": 9}
    assert judge(frame, BEATS, gate=gate).verdict == "untested"
    assert judge(frame, BEATS, gate=gate | {"every_seed": True}).verdict == "untested"


# --- names ---


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "our"}, r"claim C1: scores.csv has no model 'our' \(did you mean ours\?\); it has base, ours"),
        ({"over": "bass"}, r"no model 'bass' \(did you mean base\?\)"),
        ({"metric": "errors"}, r"no metric 'errors' \(did you mean error\?\); it has error"),
        ({"datasets": ["train"]}, "no dataset 'train'.*; it has test"),
        ({"where": {"length": 3}}, "no further column 'length'; it has none"),
        ({"seedless": "persistence"}, "no model 'persistence'"),
    ],
)
def test_unknown_names_list_what_is_there(changes: dict[str, Any], message: str) -> None:
    frame = scores({"ours": [1.0, 1.1, 0.9], "base": [2.0, 2.1, 1.9]})
    with pytest.raises(UserError, match=message):
        judge(frame, BEATS | changes)


def test_known_names_in_a_combination_that_is_not_there() -> None:
    frame = pd.concat([scores({"ours": [1, 1, 1], "base": [2, 2, 2]}), scores({"base": [1, 1, 1]}, dataset="hard")])
    with pytest.raises(UserError, match="no error of ours on hard; of ours it has error on test"):
        judge(frame, BEATS | {"datasets": ["hard"]})


@pytest.mark.parametrize("shuffle", [lambda frame: frame, lambda frame: frame.sample(frac=1, random_state=1)])
def test_the_order_of_rows_does_not_matter(shuffle: Callable[[pd.DataFrame], pd.DataFrame]) -> None:
    generator = np.random.default_rng(2)
    frame = pd.concat([items(model, generator.normal(size=(3, 30))) for model in ("ours", "base")])
    assert judge(shuffle(frame), BEATS) == judge(frame, BEATS)
