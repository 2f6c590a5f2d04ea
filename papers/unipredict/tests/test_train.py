"""The stages at the smallest size: from tables to predictions, scores and figures, and again to the same."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from shared.config import Stage, UserError, validate
from shared.evaluation.scores import read_scores
from shared.evaluation.tabular import NO_ANSWER

from .. import data
from ..config import VARIANTS, Params
from ..data import SUPERVISED, prepare
from ..evaluate import evaluate
from ..tokens import load_tokenizer
from ..train import Predictions, read_predictions, run_folder, task_rows, train, write_predictions
from .helpers import FOLDER, SECTIONS, people

MODELS = ["heavy", "light", "tabllm", "majority", "xgboost"]


def smallest() -> Params:
    section = SECTIONS["tiny"]
    few_shot = section["few_shot"] | {"models": MODELS, "ratios": [0.1, 0.8]}
    data_settings = section["data"] | {"supervised_tables": 2, "few_shot_tables": 1}
    changes = {"seeds": [0, 1], "models": MODELS, "few_shot": few_shot, "data": data_settings, "speed": None}
    return validate(Params, section | changes, "here")


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Stage[Params]:
    folder = tmp_path_factory.mktemp("paper")
    for name in ("params.yaml", "paper.yaml", "model.py", "prompts.py", "tokens.py", "train.py"):
        shutil.copy(FOLDER / name, folder / name)
    made = Stage(folder, "test", "tiny", smallest())
    prepare(made)
    for family in ("light", "heavy", "tabllm", "classical"):
        train(Stage(folder, "train", "tiny", made.params, family))
    return made


def test_every_test_row_of_every_table_has_a_prediction(stage: Stage[Params]) -> None:
    prepared = data.load(stage.data_dir)
    for model in MODELS:
        for seed in stage.params.seeds_of(model):
            predictions, _ = read_predictions(run_folder(stage, model, seed) / "predictions.npz")
            assert set(predictions) == {(task.name, key) for task in prepared.tasks for key in task.parts}
            ways = {"greedy", "sampled", "scored"} if model in VARIANTS else {"greedy"}
            for task in prepared.tasks:
                for key, part in task.parts.items():
                    each = predictions[task.name, key]
                    assert set(each.classes) == ways
                    for way in ways:
                        assert each.probabilities[way].shape == (len(part.split.test), len(task.classes))
                        assert each.classes[way].min() >= NO_ANSWER


def test_scores_and_figures_come_out_and_a_second_evaluation_is_the_same(stage: Stage[Params]) -> None:
    evaluate(stage)
    first = (stage.results_dir / "scores.csv").read_bytes()
    scores = read_scores(stage.results_dir / "scores.csv")
    assert set(MODELS) <= set(scores.model)
    assert np.isfinite(scores.value).all()
    pictures = {path.stem for path in stage.results_dir.glob("*.png")}
    assert pictures == {"accuracy", "readings", "calibration", "critical_difference", "few_shot"}
    evaluate(stage)
    assert (stage.results_dir / "scores.csv").read_bytes() == first


def test_a_finished_model_is_not_trained_again_and_seeds_give_the_same(stage: Stage[Params]) -> None:
    path = run_folder(stage, "light", 1) / "predictions.npz"
    before = path.stat().st_mtime_ns
    again = Stage(stage.folder, "train", "tiny", stage.params, "light")
    train(again)
    assert path.stat().st_mtime_ns == before
    predictions, _ = read_predictions(path)
    shutil.rmtree(run_folder(stage, "light", 1))
    train(again)
    for key, each in read_predictions(path)[0].items():
        for way, probabilities in each.probabilities.items():
            assert np.array_equal(predictions[key].probabilities[way], probabilities)


def test_prompts_of_the_test_rows_carry_no_answer(stage: Stage[Params]) -> None:
    tokenizer = load_tokenizer(stage.params.language, stage.data_dir / "tokenizer.json")
    for task in data.load(stage.data_dir).pool(SUPERVISED):
        rows = task_rows(task, SUPERVISED, "test", VARIANTS["light"], stage.params, tokenizer)
        assert rows.answers == []
        assert all(text.endswith("Answer:") for text in tokenizer.decode(rows.whole()))


def test_predictions_come_back_and_damage_is_told(tmp_path: Path) -> None:
    made = Predictions({"greedy": np.eye(2)}, {"greedy": np.array([0, 1])})
    write_predictions(tmp_path / "p.npz", {("a__b", "0.1"): made}, {"identity": "x"})
    found, note = read_predictions(tmp_path / "p.npz")
    assert note == {"identity": "x"}
    assert (found["a__b", "0.1"].probabilities["greedy"] == np.eye(2)).all()
    (tmp_path / "p.npz").write_bytes(b"PK\x03")
    with pytest.raises(UserError, match="run the training again"):
        read_predictions(tmp_path / "p.npz")


def test_an_unknown_family(stage: Stage[Params]) -> None:
    with pytest.raises(UserError, match="choose one of heavy, light, tabllm, classical, networks"):
        train(Stage(stage.folder, "train", "tiny", stage.params, "heavier"))


def test_a_model_learns_to_answer_for_rows_it_has_not_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The class follows a number against a threshold: written answers are far above the share of the larger class."""
    for name in ("model.py", "prompts.py", "tokens.py", "train.py", "baselines.py", "augment.py", "generation.py"):
        shutil.copy(FOLDER / name, tmp_path / name)
    section = SECTIONS["tiny"]
    params = validate(
        Params,
        section
        | {
            "seeds": [0, 1],
            "models": ["heavy_noaug", "majority"],
            "few_shot": section["few_shot"] | {"models": ["majority"]},
            "data": section["data"] | {"train_rows": 360, "test_rows": 40},
            "language": section["language"] | {"num_layers": 2, "hidden_size": 48},
            "training": section["training"] | {"epochs": 12, "batch_size": 2},
        },
        "here",
    )
    monkeypatch.setattr(data, "read_sources", lambda _: [(people(400), "supervised", "made")])
    stage = Stage(tmp_path, "train", "tiny", params, "heavy_noaug")
    prepare(stage)
    train(stage)
    task = data.load(stage.data_dir).tasks[0]
    labels = task.classes.labels[task.parts[SUPERVISED].split.test]
    predictions, _ = read_predictions(run_folder(stage, "heavy_noaug", 0) / "predictions.npz")
    answers = predictions[task.name, SUPERVISED].classes["greedy"]
    assert (answers == labels).mean() > max(np.bincount(labels)) / len(labels) + 0.2
