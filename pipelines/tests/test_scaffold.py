"""Copying a paper: what comes along, what does not, and that a failure leaves nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

import pipelines.scaffold
from pipelines.scaffold import new_paper, root_stage
from shared.config import UserError

PIPELINE = """\
# The papers, and what is made of all of them.
stages:
  papers/cape:  # the first
    wdir: papers/cape
    vars: [params.yaml]
    cmd: reprise verdict
    deps: [paper.yaml, "results/${profile}/scores.csv"]
    outs:
      - "results/${profile}/verdict.json": {cache: false}

  # The page of all papers.
  scoreboard:
    cmd: reprise board
    deps:
      - pipelines/board.py
      - papers/cape/results
    outs:
      - board/index.html
"""

README = """# A paper
How to run: dvc repro
<!-- results:begin -->
| old | table |
<!-- results:end -->
Thanks.
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    paper = tmp_path / "papers" / "cape"
    files = {
        "paper.yaml": "title: A paper\n",
        "README.md": README,
        "data.py": "# data\n",
        "dvc.lock": "lock",
        "tests/data/tiny.csv": "kept: a test's own data",
        "data/set.npz": "",
        "runs/fno/last.safetensors": "",
        "results/small/scores.csv": "",
        "__pycache__/data.cpython-311.pyc": "",
    }
    for name, content in files.items():
        (paper / name).parent.mkdir(parents=True, exist_ok=True)
        (paper / name).write_text(content)
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "dvc.yaml").write_text(PIPELINE)
    return tmp_path


def tree(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_copies_code_but_no_outputs(root: Path) -> None:
    folder = new_paper(root, "mine")
    assert folder == root / "papers" / "mine"
    assert tree(folder) == ["README.md", "data.py", "paper.yaml", "tests/data/tiny.csv"]
    readme = (folder / "README.md").read_text()
    assert "old" not in readme
    assert readme.startswith("# A paper")
    assert readme.endswith("<!-- results:end -->\nThanks.\n")


def test_stage_joins_the_pipeline_and_comments_stay(root: Path) -> None:
    new_paper(root, "mine")
    text = (root / "dvc.yaml").read_text()
    stages = yaml.safe_load(text)["stages"]
    assert list(stages) == ["papers/cape", "papers/mine", "scoreboard"]
    assert stages["papers/mine"] == root_stage("mine")
    assert stages["papers/cape"] == root_stage("cape"), "the form that is added is the form that is there"
    assert stages["scoreboard"]["deps"] == ["pipelines/board.py", "papers/cape/results", "papers/mine/results"]
    for comment in ("# The papers, and what", "# the first", "# The page of all papers."):
        assert comment in text
    assert set(PIPELINE.splitlines()) <= set(text.splitlines()), "no line that was there has changed"


def test_a_copy_can_be_copied(root: Path) -> None:
    new_paper(root, "mine")
    new_paper(root, "mine_too", source="papers/mine")
    stages = yaml.safe_load((root / "dvc.yaml").read_text())["stages"]
    assert list(stages) == ["papers/cape", "papers/mine", "papers/mine_too", "scoreboard"]
    assert stages["scoreboard"]["deps"][-1] == "papers/mine_too/results"


@pytest.mark.parametrize("name", ["Mine", "my-paper", "2nd", "class", "_hidden", "", "a/b", "..", "ünï"])
def test_impossible_names(root: Path, name: str) -> None:
    with pytest.raises(UserError, match="lowercase letters"):
        new_paper(root, name)


def test_names_that_are_taken(root: Path) -> None:
    with pytest.raises(UserError, match="exists already"):
        new_paper(root, "cape")
    (root / "dvc.yaml").write_text(PIPELINE.replace("papers/cape:", "papers/mine:"))
    with pytest.raises(UserError, match="already has a stage"):
        new_paper(root, "mine")


def test_unknown_source(root: Path) -> None:
    with pytest.raises(UserError, match=r"no paper 'cappe' to copy \(did you mean 'cape'\?\); there are: cape"):
        new_paper(root, "mine", source="cappe")


@pytest.mark.parametrize("pipeline", ["stages: [unclosed", "- a list\n", "stages:\n", "vars: []\n", None])
def test_broken_pipeline_leaves_nothing(root: Path, pipeline: str | None) -> None:
    if pipeline is None:
        (root / "dvc.yaml").unlink()
    else:
        (root / "dvc.yaml").write_text(pipeline)
    before = tree(root)
    with pytest.raises(UserError, match=r"dvc\.yaml"):
        new_paper(root, "mine")
    assert tree(root) == before


@pytest.mark.parametrize("step", ["_reset_results", "write_text"])
def test_failure_on_the_way_leaves_nothing(root: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipelines.scaffold, step, interrupted)
    before = tree(root)
    with pytest.raises(KeyboardInterrupt):
        new_paper(root, "mine")
    assert tree(root) == before
    assert [path.name for path in (root / "papers").iterdir()] == ["cape"]
