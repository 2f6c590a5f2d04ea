"""What every folder in papers/ must keep. A new paper is checked without a line from its author."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pandas as pd
import pytest
import yaml

from pipelines.papers import find_papers, load_paper
from pipelines.runner import import_paper
from shared.config import load_params
from shared.evaluation.scores import SCORE_COLUMNS, code_digest, params_digest
from tests.repository import Repository, stage_calls

ROOT = Path(__file__).parents[1]
PAPERS = find_papers(ROOT)
FILES = (
    "README.md",
    "paper.yaml",
    "params.yaml",
    "dvc.yaml",
    "config.py",
    "data.py",
    "train.py",
    "evaluate.py",
    "tests",
)
MARKERS = ("<!-- results:begin -->", "<!-- results:end -->")

each_paper = pytest.mark.parametrize("folder", PAPERS, ids=lambda folder: folder.name)


def result_folders(folder: Path) -> list[Path]:
    return sorted(path.parent for path in folder.glob("results/*/scores.csv") if path.parent.name != "tiny")


def test_there_are_papers() -> None:
    assert PAPERS


@each_paper
def test_files_are_there(folder: Path) -> None:
    missing = [name for name in FILES if not (folder / name).exists()]
    assert not missing
    assert list(folder.glob("tests/test_*.py"))


@each_paper
def test_the_ledger_is_complete(folder: Path) -> None:
    paper = load_paper(folder)
    assert paper.claims, "a paper without claims has nothing to put to the proof"
    assert paper.claims[0].headline, "the abstract's headline claims come first"
    assert all(claim.all_checks() or claim.untested for claim in paper.claims)


@each_paper
def test_params_hold_for_every_profile(folder: Path) -> None:
    import importlib

    schema = importlib.import_module(f"{import_paper(folder)}.config").Params
    for profile in ("small", "tiny"):
        load_params(folder / "params.yaml", schema, profile)
    assert yaml.safe_load((folder / "params.yaml").read_text())["profile"] == "small"


@each_paper
def test_nothing_inside_names_the_folder(folder: Path) -> None:
    pattern = re.compile(rf"papers[./]{folder.name}\b")
    for path in folder.rglob("*"):
        inside = path.relative_to(folder).parts[0]
        if inside not in ("data", "runs", "results", "README.md") and path.suffix in (".py", ".yaml"):
            assert not pattern.search(path.read_text(encoding="utf-8")), f"{path} names its own folder"


@each_paper
def test_the_root_has_a_stage_for_it(folder: Path) -> None:
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    stage = stages[f"papers/{folder.name}"]
    assert stage["wdir"] == f"papers/{folder.name}"
    assert "results/${profile}/scores.csv" in stage["deps"]
    assert f"papers/{folder.name}/results" in stages["scoreboard"]["deps"]


@each_paper
def test_stages_are_functions_of_the_folder(folder: Path) -> None:
    from pipelines.runner import find_stage

    package = import_paper(folder)
    for call in stage_calls(folder):
        assert callable(find_stage(folder, package, call.partition("@")[0]))


@each_paper
def test_the_readme_has_its_results_block(folder: Path) -> None:
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert all(text.count(marker) == 1 for marker in MARKERS)
    for image in re.findall(r"!\[[^]]*\]\(([^)]+)\)", text):
        assert (folder / image).is_file(), f"README shows {image}, which is not there"


@each_paper
def test_small_results_are_committed(folder: Path) -> None:
    assert (folder / "results" / "small" / "verdict.json").is_file()


@each_paper
def test_results_are_fresh_and_rest_on_three_seeds_or_on_test_items(folder: Path) -> None:
    params = yaml.safe_load((folder / "params.yaml").read_text())
    for results in result_folders(folder):
        metrics = json.loads((results / "metrics.json").read_text())
        assert metrics["digest"]["code"] == code_digest(folder), f"{results} is older than the folder's code"
        assert metrics["digest"]["params"] == params_digest(params[results.name]), f"{results} is older than its params"
        scores = pd.read_csv(results / "scores.csv")
        assert list(scores.columns[: len(SCORE_COLUMNS)]) == list(SCORE_COLUMNS)
        verdict = json.loads((results / "verdict.json").read_text())
        assert [claim["id"] for claim in verdict["claims"]] == [claim.id for claim in load_paper(folder).claims]
        if scores["seed"].nunique() < 3:
            # Published measurements, which no seed of ours can vary: test items, or exact numbers.
            judged = [c for claim in verdict["claims"] for c in claim["comparisons"] if c["verdict"] != "untested"]
            assert judged
            assert all(c["items"] >= 3 or c["low"] == c["high"] for c in judged)


@each_paper
def test_the_whole_pipeline_runs_at_tiny_size(folder: Path, tmp_path: Path) -> None:
    """Under another name, as somebody's own project, twice to the same scores."""
    repository = Repository(ROOT, tmp_path / "repository")
    copy = repository.add(folder.name, "renamed")
    repository.run_pipeline(copy)
    scores = (copy / "results" / "tiny" / "scores.csv").read_bytes()
    repository.run("reprise", "verdict", "papers/renamed")
    verdict = json.loads((copy / "results" / "tiny" / "verdict.json").read_text())
    assert verdict["paper"] == "renamed"
    assert len(verdict["claims"]) == len(load_paper(folder).claims)
    again = repository.add(folder.name, "again")
    repository.run_pipeline(again)
    assert (again / "results" / "tiny" / "scores.csv").read_bytes() == scores
