"""Scores of hand-made transcripts, and the whole pipeline at tiny size."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from shared.config import Stage, UserError, load_params
from shared.evaluation.scores import read_scores

from ..config import FAMILIES, Params
from ..data import Lists, load, prepare
from ..evaluate import domain_rows, evaluate, examples, published_rate
from ..pretrain import pretrain
from ..train import run_folder, train

FOLDER = Path(__file__).parents[1]
LISTS = Lists(
    [["the fog ran", "the log ran"], ["a cat sat", "a cat sad"], ["to mat", "the mat"]],
    ["the dog ran", "a cat sat", "to the mat"],
    [[0.0, -1.0]] * 3,
    ["x", "x", "x"],
)


def scored(outputs: dict[tuple[str, int], list[str]]) -> pd.DataFrame:
    return pd.DataFrame(domain_rows(LISTS, outputs, "x"))


def value(frame: pd.DataFrame, model: str, metric: str) -> float:
    return float(frame[frame.model.eq(model) & frame.metric.eq(metric)].value.mean())


def test_rows_by_utterance_average_to_the_corpus_rate() -> None:
    frame = scored({("one_best", 0): [each[0] for each in LISTS.nbest]})
    assert value(frame, "one_best", "wer") == pytest.approx(100 * 2 / 9, rel=1e-4)
    assert value(frame, "one_best", "corpus_wer") == pytest.approx(100 * 2 / 9)
    assert value(frame, "one_best", "macro_wer") == pytest.approx(100 * (1 / 3 + 0 + 1 / 3) / 3)
    assert value(frame, "oracle_nbest", "corpus_wer") == pytest.approx(100 * 2 / 9)
    assert value(frame, "oracle_compositional", "corpus_wer") == pytest.approx(100 * 1 / 9)


def test_recovered_repaired_and_broken_words_are_counted() -> None:
    frame = scored({("pointer_generator", 0): ["the dog ran", "a cat mat", "to the mat"]})
    assert value(frame, "pointer_generator", "recovered_out_of_list") == pytest.approx(1.0)
    assert value(frame, "pointer_generator", "repaired") == pytest.approx(100 * 2 / 9)
    assert value(frame, "pointer_generator", "broken") == pytest.approx(100 * 1 / 9)


def test_gains_of_re_ranking_are_shares_of_the_first_hypotheses_errors() -> None:
    frame = scored({("lm_rank_trigram", 0): ["the fog ran", "a cat sat", "to the mat"]})
    assert value(frame, "lm_rank_trigram", "wer_reduction") == pytest.approx(0.5, rel=1e-4)


def test_the_published_rate_averages_utterances_without_punctuation_and_digits() -> None:
    assert published_rate(["a b", "c d e f", "7"], ["A, x 9", "c d e f!", "no"]) == pytest.approx(0.25)


def test_demonstrations_become_a_column() -> None:
    frame = scored({("llama_prompted/2", 0): list(LISTS.references)})
    rows = frame[frame.model.eq("llama_prompted") & frame.metric.eq("corpus_wer")]
    assert rows.demonstrations.tolist() == [2]


def test_examples_are_the_first_of_their_kind() -> None:
    found = examples(LISTS, {("pointer_generator", 1): ["the dog ran", "a cat mat", "to the mat"]})
    assert [each["reference"] for each in found] == ["the dog ran", "to the mat", "a cat sat"]


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Stage[Params]:
    """The whole pipeline at tiny size."""
    folder = tmp_path_factory.mktemp("papers") / "project"
    shutil.copytree(FOLDER, folder, ignore=shutil.ignore_patterns("data", "runs", "results", "__pycache__", "tests"))
    profile, params = load_params(folder / "params.yaml", Params, "tiny")

    def at(name: str, model: str | None = None) -> Stage[Params]:
        return Stage(folder, name, profile, params, model)

    prepare(at("prepare"))
    pretrain(at("pretrain"))
    for family in FAMILIES:
        train(at("train", family))
    evaluate(at("evaluate"))
    return at("evaluate")


def test_the_pipeline_scores_every_model_and_draws(stage: Stage[Params]) -> None:
    frame = read_scores(stage.results_dir / "scores.csv")
    for model in stage.params.models:
        rows = frame[frame.model.eq(model) & frame.metric.eq("wer")]
        assert rows.seed.nunique() == len(stage.params.seeds)
        assert np.isfinite(rows.value).all()
    assert {"word_error_rates.png", "repaired_and_broken.png"} <= {
        path.name for path in stage.results_dir.glob("*.png")
    }
    costs = read_scores(stage.results_dir / "costs.csv")
    assert (costs[costs.metric.eq("pairs_per_second")].value > 0).all()
    trained = costs[costs.metric.eq("trained_parameters")].groupby("model").value.first()
    assert trained["lm_lora"] < trained["lm_full"] / 10


def test_what_was_prepared_is_whole(stage: Stage[Params]) -> None:
    prepared = load(stage.data_dir)
    assert {name: len(part) for name, part in prepared.lists.items()} == {"train": 60, "validation": 12, "test": 12}
    assert all(len(nbest) == 5 for nbest in prepared.lists["test"].nbest)
    assert prepared.index["source"].startswith("generated")


def test_a_finished_training_is_not_repeated(stage: Stage[Params]) -> None:
    weights = run_folder(stage, "lm_full", 0) / "best.safetensors"
    before = weights.stat().st_mtime_ns
    train(Stage(stage.folder, "train", stage.profile, stage.params, "lm_full"))
    assert weights.stat().st_mtime_ns == before


def test_transcripts_that_do_not_fit_are_refused(stage: Stage[Params], tmp_path: Path) -> None:
    copied = tmp_path / "project"
    shutil.copytree(stage.folder, copied)
    there = Stage(copied, "evaluate", stage.profile, stage.params)
    path = run_folder(there, "lm_full", 0) / "transcripts.json"
    path.write_text(json.dumps({"lm_full": ["one"]}))
    with pytest.raises(UserError, match="run its stage again"):
        evaluate(there)
    path.unlink()
    with pytest.raises(UserError, match="is missing"):
        evaluate(there)


def test_a_model_that_is_not_there_is_named(stage: Stage[Params]) -> None:
    with pytest.raises(UserError, match="encoder_decoder"):
        train(Stage(stage.folder, "train", stage.profile, stage.params, "whisper"))
