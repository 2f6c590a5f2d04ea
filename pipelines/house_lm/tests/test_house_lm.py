"""House models: recipe, checkpoints, going on after a kill, tables, the command, the pipeline's stages."""

from __future__ import annotations

import csv
import itertools
import json
import re
import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from typer.testing import CliRunner

from pipelines.claims import judge_claim
from pipelines.cli import app
from pipelines.house_lm import train as training
from pipelines.house_lm.config import Mixture, Params, load
from pipelines.house_lm.stages import train_and_test
from pipelines.house_lm.train import (
    learning_rate,
    make_corpus,
    make_optimizer,
    model_folder,
    train,
    training_step,
)
from pipelines.papers import Claim
from shared.config import UserError, validate
from shared.evaluation.abilities import gate_rows, read_gates
from shared.lm.model import HouseConfig, HouseModel

FOLDER = Path(training.__file__).parent
RIGHT = {"data": {"kind": "documents", "weights": {"ind": 1}}, "steps": 200, "length": 16}


@pytest.fixture(scope="module")
def tiny() -> Params:
    """Eight steps of small batches."""
    params = load(FOLDER, "tiny")[1]
    changes = {"batch_size": 4, "checkpoints": (0, 4)}
    mixtures = {name: mixture.model_copy(update=changes) for name, mixture in params.mixtures.items()}
    return params.model_copy(update={"max_steps": 8, "save_every_steps": 3, "mixtures": mixtures})


@pytest.fixture(scope="module")
def models(tiny: Params, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and a model that goes on from it."""
    models = tmp_path_factory.mktemp("house") / "models"
    for name in ("base", "skills"):
        train_and_test(tiny, name, "S", 0, models)
    return models


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return HouseModel.load(folder).state_dict()


def same(one: Path, other: Path) -> bool:
    first, second = weights(one), weights(other)
    return all(torch.equal(first[name], second[name]) for name in first)


# ------------------------------------------------------------------------------------------------------------- params


@pytest.mark.parametrize("profile", ["full", "tiny"])
def test_params_hold(profile: str) -> None:
    params = load(FOLDER, profile)[1]
    assert {"base", "skills", "skills-imperfect-co", "arith", "text", "agnews"} <= params.mixtures.keys()
    assert yaml.safe_load((FOLDER / "params.yaml").read_text())["profile"] == "full"
    if profile == "tiny":
        assert all(params.mixture(name).steps == 20 for name in params.mixtures)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": {"kind": "documents", "weights": {"indd": 1}}}, "did you mean 'ind'"),
        ({"data": {"kind": "documents", "weights": {"ind": 0}}}, "one must be positive"),
        ({"data": {"kind": "text", "corpus": "novels", "vocab_size": 100}}, "'python', 'children' or 'agnews'"),
        ({"abilities": ["flying"]}, "unknown abilities flying"),
        ({"abilities": ["language"]}, "running text"),
        ({"steps": 50}, "warmup_steps"),
        ({"decay_steps": 20}, "mixtures with 'until'"),
        ({"until": {"ability": "flying"}}, "until: unknown ability 'flying'"),
        ({"until": {"ability": "induction"}, "decay_steps": 150}, "fewer than steps"),
        ({"parent": "base", "network": {"act": "relu"}}, "leave network out"),
        ({"network": {"hidden_size": 3}}, "not chosen here"),
        ({"stepps": 3}, "unknown key"),
    ],
)
def test_a_wrong_mixture_is_named(change: dict, message: str) -> None:
    validate(Mixture, RIGHT, "here")
    with pytest.raises(UserError, match=message):
        validate(Mixture, RIGHT | change, "here")


def test_parents_must_be_there_and_speak_the_same_tokens() -> None:
    base = RIGHT
    other = base | {"data": {"kind": "documents", "lexicon": "published", "weights": {"ind": 1}}, "parent": "base"}
    with pytest.raises(UserError, match="'nobody' is not among"):
        validate(Params, {"mixtures": {"child": base | {"parent": "nobody"}}}, "here")
    with pytest.raises(UserError, match="other tokens than its parent"):
        validate(Params, {"mixtures": {"base": base, "child": other}}, "here")


def test_a_size_has_its_own_recipe() -> None:
    waits = {"steps": 2200, "until": {"ability": "skills"}}
    params = validate(Params, {"mixtures": {"base": RIGHT, "more": RIGHT}, "sizes": {"M": {"base": waits}}}, "here")
    assert params.of_size("S").mixtures == params.mixtures
    large = params.of_size("M")
    assert (large.mixture("base").steps, large.mixture("base").until.ability) == (2200, "skills")
    assert large.mixture("more") == params.mixture("more")
    assert large.of_size("M") == large


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"XL": {}}, "no size 'XL'; choose among S, M, T, D"),
        ({"M": {"bass": {}}}, "M changes bass, which is not among the mixtures"),
        ({"M": {"base": {"stepps": 3}}}, "stepps"),
        (
            {"M": {"base": {"data": {"kind": "documents", "lexicon": "published", "weights": {"ind": 1}}}}},
            "other tokens",
        ),
    ],
)
def test_a_wrong_recipe_of_a_size_is_named(sizes: dict, message: str) -> None:
    mixtures = {"base": RIGHT, "child": RIGHT | {"parent": "base"}}
    with pytest.raises(UserError, match=message):
        validate(Params, {"mixtures": mixtures, "sizes": sizes}, "here")


# ------------------------------------------------------------------------------------------------------------- recipe


def test_the_learning_rate_rises_and_falls() -> None:
    mixture = validate(Mixture, RIGHT | {"steps": 2200}, "here")
    assert learning_rate(mixture, 0, None) == pytest.approx(1e-5)
    assert learning_rate(mixture, 49, None) == pytest.approx(5e-4)
    assert learning_rate(mixture, 100, 100) == pytest.approx(1e-3)
    assert learning_rate(mixture, 1150, 100) == pytest.approx(5.5e-4)
    assert learning_rate(mixture, 2200, 100) == pytest.approx(1e-4)


def test_the_learning_rate_waits_and_falls() -> None:
    waits = {"steps": 2200, "until": {"ability": "induction"}, "decay_steps": 600}
    mixture = validate(Mixture, RIGHT | waits, "here")
    assert learning_rate(mixture, 1500, None) == pytest.approx(1e-3)
    assert learning_rate(mixture, 1500, 1500) == pytest.approx(1e-3)
    assert learning_rate(mixture, 1800, 1500) == pytest.approx(5.5e-4)
    assert learning_rate(mixture, 2100, 1500) == pytest.approx(1e-4)


def test_only_matrices_decay() -> None:
    mixture = load(FOLDER, "full")[1].mixture("skills")
    model = HouseModel(HouseConfig.of_size("S", 20))
    groups = make_optimizer(model, mixture).param_groups
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert {parameter.ndim for parameter in groups[0]["params"]} == {2}
    assert {parameter.ndim for parameter in groups[1]["params"]} == {1}
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    assert groups[0]["betas"] == (0.9, 0.95)


def test_a_step_learns_its_batch_and_keeps_the_gradient_short() -> None:
    torch.manual_seed(0)
    model = HouseModel(HouseConfig.of_size("S", 20))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    batch = torch.randint(20, (4, 17))
    first = training_step(model, optimizer, batch, clip=0.01)
    moved = torch.stack([(new - old).norm() for new, old in zip(model.parameters(), before, strict=True)]).norm()
    assert moved.item() == pytest.approx(0.01, rel=1e-3)
    assert training_step(model, optimizer, batch, clip=0.01) < first


def test_batches_are_a_function_of_seed_and_step(tiny: Params) -> None:
    mixture = tiny.mixture("base").model_copy(update={"steps": 120})
    corpus = make_corpus(mixture, "base", 0)
    cpu = torch.device("cpu")
    everything = dict(training._batches(corpus, mixture, 0, cpu))
    later = dict(training._batches(corpus, mixture, 70, cpu))
    assert list(everything) == list(range(120))
    assert list(later) == list(range(70, 120))
    assert all(torch.equal(later[step], everything[step]) for step in later)
    assert everything[0].shape == (4, 65)
    assert not torch.equal(everything[0], everything[50])
    assert not torch.equal(everything[0], dict(training._batches(make_corpus(mixture, "base", 1), mixture, 0, cpu))[0])


# ----------------------------------------------------------------------------------------------------------- training


def test_a_model_leaves_what_papers_need(models: Path, tiny: Params) -> None:
    folder = model_folder(models, "skills", "S", 0)
    model = HouseModel.load(folder)
    vocabulary = json.loads((folder / "vocab.json").read_text())
    assert model.config.vocab_size == len(vocabulary) == 850
    record = json.loads((folder / "training.json").read_text())
    assert record["source"].startswith("generated")
    assert record["steps"] == 8
    assert record["tokens"] == 8 * 4 * 96
    assert not (folder / "last.safetensors").exists()
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["0", "4"]
    assert same(folder / "checkpoints" / "0", model_folder(models, "base", "S", 0)), "it goes on from its parent"
    assert not same(folder / "checkpoints" / "4", folder)
    abilities = [row["ability"] for row in read_gates(folder)]
    assert list(dict.fromkeys(abilities)) == list(tiny.mixture("skills").abilities)
    assert {row["model"] for row in gate_rows(folder)} == {"skills/S", "bigram", "chance"}


def test_the_same_seed_gives_the_same_files(models: Path, tiny: Params, tmp_path: Path) -> None:
    again, _ = train_and_test(tiny, "base", "S", 0, tmp_path)
    for path in model_folder(models, "base", "S", 0).rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (again / path.relative_to(model_folder(models, "base", "S", 0))).read_bytes()
    other = train(tiny, "base", "S", 1, tmp_path)
    assert not same(again / "checkpoints" / "0", other / "checkpoints" / "0")


def test_a_killed_training_goes_on_to_the_same_numbers(
    models: Path, tiny: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = 0

    def until_killed(*arguments: object) -> torch.Tensor:
        nonlocal steps
        steps += 1
        if steps == 5:
            raise KeyboardInterrupt
        return training_step(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(training, "training_step", until_killed)
    with pytest.raises(KeyboardInterrupt):
        train(tiny, "base", "S", 0, tmp_path)
    assert not (model_folder(tmp_path, "base", "S", 0) / "training.json").exists()
    train(tiny, "base", "S", 0, tmp_path)
    assert steps == 5 + 5, "from the checkpoint after step 3"
    assert same(model_folder(tmp_path, "base", "S", 0), model_folder(models, "base", "S", 0))
    record, straight = (
        json.loads((model_folder(place, "base", "S", 0) / "training.json").read_text()) for place in (tmp_path, models)
    )
    assert record == straight


def test_a_finished_model_is_only_tested_again(
    models: Path, tiny: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(models, tmp_path / "models")
    folder = model_folder(tmp_path / "models", "base", "S", 0)
    before = (folder / "gates.csv").read_bytes()
    (folder / "gates.csv").unlink()
    monkeypatch.setattr(training, "training_step", None)
    train_and_test(tiny, "base", "S", 0, tmp_path / "models")
    assert (folder / "gates.csv").read_bytes() == before


def test_other_params_train_anew(models: Path, tiny: Params, tmp_path: Path) -> None:
    shutil.copytree(models, tmp_path / "models")
    mixtures = tiny.mixtures | {"base": tiny.mixtures["base"].model_copy(update={"learning_rate": 5e-4})}
    folder = model_folder(tmp_path / "models", "base", "S", 0)
    (folder / "checkpoints" / "6").mkdir()
    train(tiny.model_copy(update={"mixtures": mixtures}), "base", "S", 0, tmp_path / "models")
    assert not same(folder, model_folder(models, "base", "S", 0))
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["0", "4"], "none of the older model's"


@pytest.mark.parametrize(
    ("decay_steps", "accuracies", "steps"),
    [(0, [0.2, 0.95], 4), (3, [0.2, 0.95], 7), (3, [0.2, 0.3], 8)],
    ids=["ends when it is learned", "and falls", "waits no longer than the steps allow"],
)
def test_training_waits_for_an_ability(
    decay_steps: int,
    accuracies: list[float],
    steps: int,
    tiny: Params,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    values = iter(accuracies)
    mixture = tiny.mixture("base").model_copy(update={"decay_steps": decay_steps})
    params = tiny.model_copy(update={"mixtures": {"base": mixture}})
    monkeypatch.setattr(training, "WAIT_STEPS", 2)
    monkeypatch.setattr(training, "waited_for", lambda model, mixture: next(values))
    record = json.loads((train(params, "base", "S", 0, tmp_path) / "training.json").read_text())
    assert record["steps"] == steps
    assert record["waiting"] == [[2, accuracies[0]], [4, accuracies[1]]]
    assert record["decays_from"] == (4 if accuracies[1] > 0.9 else 5)


def test_contexts_grow_in_a_derived_model(models: Path, tiny: Params, tmp_path: Path) -> None:
    shutil.copytree(models, tmp_path / "models")
    mixtures = tiny.mixtures | {"skills-long": tiny.mixtures["skills-long"].model_copy(update={"batch_size": 1})}
    folder = train(tiny.model_copy(update={"mixtures": mixtures}), "skills-long", "S", 0, tmp_path / "models")
    model = HouseModel.load(folder)
    assert model.config.rotary_base == 8 * 10_000
    assert model.config.max_length >= 512
    assert json.loads((folder / "training.json").read_text())["tokens"] == 8 * 512
    assert same(folder / "checkpoints" / "0", model_folder(models, "skills", "S", 0))


@pytest.mark.parametrize(("name", "size"), [("arith", "S"), ("text", "T")])
def test_models_without_a_parent(name: str, size: str, tiny: Params, tmp_path: Path) -> None:
    folder, rows = train_and_test(tiny, name, size, 0, tmp_path)
    assert [row["value"] for row in read_gates(folder)] == [row["value"] for row in rows]
    assert {row["mixture"] for row in rows} == {name}
    if name == "text":
        assert {row["ability"] for row in rows} == {"language_python"}
        assert {"loss", "trigram_loss", "bigram_correlation"} <= {row["metric"] for row in rows}


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("skills", "S", r"goes on from base.*reprise house-lm train --mixture base --size S --seed 0"),
        ("skils", "S", "choose one of base, codes, skills"),
        ("base", "XXL", "choose one of S, M, T, D"),
    ],
)
def test_mistakes_are_named(name: str, size: str, message: str, tiny: Params, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        train(tiny, name, size, 0, tmp_path)


def test_a_loss_that_is_not_finite_ends_the_training(tiny: Params, tmp_path: Path) -> None:
    mixtures = tiny.mixtures | {"base": tiny.mixtures["base"].model_copy(update={"learning_rate": 1e12})}
    with pytest.raises(UserError, match=r"the loss became .* Lower learning_rate"):
        train(tiny.model_copy(update={"mixtures": mixtures}), "base", "S", 0, tmp_path)


@pytest.mark.parametrize(("at_least", "verdict"), [(0.9, "untested"), (0.0, "holds")])
def test_a_claim_waits_for_the_ability(models: Path, at_least: float, verdict: str) -> None:
    """An untrained model closes the gate, and the ledger says with which value."""
    gate = {"model": "skills/S", "dataset": "gate/needle_3", "metric": "accuracy", "at_least": at_least}
    check = {"kind": "threshold", "metric": "score", "datasets": "needles", "model": "masked", "at_most": 1}
    about = {"id": "C1", "statement": "It is", "place": "nowhere", "figures": "none", "mark": "not obtained"}
    claim = Claim.model_validate(about | {"check": check, "gate": gate})
    own = [{"model": "masked", "dataset": "needles", "metric": "score", "seed": k, "value": 0.5} for k in range(3)]
    rows = gate_rows(model_folder(models, "skills", "S", 0))
    judged = judge_claim(claim, pd.DataFrame([*own, *rows]), "small")
    assert judged.verdict == verdict
    if verdict == "untested":
        assert judged.reason.startswith("gate not passed: accuracy of skills/S on gate/needle_3 is 0")


# ----------------------------------------------------------------------------------------------- command and pipeline


def test_the_command_trains_and_leaves_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REPRISE_TRACKING", "off")
    content = yaml.safe_load((FOLDER / "params.yaml").read_text())
    tiny = content["tiny"] | {"max_steps": 2, "sizes": {}}
    tiny["mixtures"] = {"base": tiny["mixtures"]["base"] | {"batch_size": 2}}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump({"profile": "tiny", "tiny": tiny}))
    arguments = ["house-lm", "train", "--mixture", "base", "--folder", str(tmp_path), "--workers", "1"]
    result = CliRunner().invoke(app, [*arguments, "--seed", "0", "--seed", "1"], catch_exceptions=False)
    assert result.exit_code == 0
    tables = sorted((tmp_path / "results" / "tiny" / "base").iterdir())
    assert [table.name for table in tables] == ["S-seed0.csv", "S-seed1.csv"]
    rows = list(csv.DictReader(tables[1].open()))
    assert {row["seed"] for row in rows} == {"1"}
    shown = CliRunner().invoke(app, ["house-lm", "gates", "--folder", str(tmp_path)], catch_exceptions=False).output
    assert "induction" in shown
    assert "reverse_recall" in shown


def test_every_mixture_has_its_stage_and_a_stage_its_parent() -> None:
    content = yaml.safe_load((FOLDER / "dvc.yaml").read_text())
    lists = {f"${{{name}}}": items for part in content["vars"] for name, items in part.items()}
    params = load(FOLDER, "full")[1]
    assert content["stages"].keys() == params.mixtures.keys()
    models: dict[str, set[str]] = {}
    for name, entry in content["stages"].items():
        stage = entry.get("do", entry)
        assert f"--mixture {name} " in stage["cmd"]
        assert f"${{profile}}.mixtures.{name}" in stage["params"]
        outs = [next(iter(out)) for out in stage["outs"]]
        assert outs[0] == f"models/{name}/${{item.size}}/seed${{item.seed}}"
        local = [dep for dep in stage["deps"] if "$" not in dep]
        assert all((FOLDER / dep).is_file() for dep in local)
        models[name] = set()
        items = lists[entry["foreach"]].values() if "foreach" in entry else all_of(entry["matrix"])
        for item in items:
            size, seed = item["size"], item["seed"]
            models[name].add(f"models/{name}/{size}/seed{seed}")
            trained = [filled(dep, item) for dep in stage["deps"] if dep.startswith("models/")]
            mixture = params.of_size(size).mixture(name)
            assert trained == ([f"models/{mixture.parent}/{size}/seed{seed}"] if mixture.parent else [])
            assert not mixture.parent or set(trained) <= models[mixture.parent]
            # Whose recipe is another at a size, that one's stage runs again when it changes.
            if mixture != params.mixture(name):
                assert "${profile}.sizes.${item.size}" in stage["params"]


def all_of(matrix: dict[str, list]) -> list[dict]:
    return [dict(zip(matrix, values, strict=True)) for values in itertools.product(*matrix.values())]


def filled(text: str, item: dict) -> str:
    for key, value in item.items():
        text = text.replace(f"${{item.{key}}}", str(value))
    return text


def test_stages_depend_on_all_code_that_weights_depend_on() -> None:
    stages = yaml.safe_load((FOLDER / "dvc.yaml").read_text())["stages"]
    for name, stage in stages.items():
        named = {re.sub(r"^(\.\./)+", "", dep) for dep in stage.get("do", stage)["deps"]}
        kind = "text" if name.startswith(("text", "agnews")) else "documents"
        needed = {*training.CODE_OF_ALL, *training.CODE[kind]}
        assert {path.removeprefix("pipelines/house_lm/") for path in needed} <= named
