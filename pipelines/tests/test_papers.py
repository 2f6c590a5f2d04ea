from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines.papers import find_papers, load_paper, resolve_folder
from shared.config import UserError

CHECK = {"kind": "threshold", "metric": "error", "model": "ours", "datasets": "test", "at_most": 1}


def ledger(**changes: Any) -> dict[str, Any]:
    claim = {"id": "C1", "statement": "It works.", "place": "abstract", "figures": "none", "mark": "read"}
    paper = {
        "title": "A paper",
        "authors": ["Ada Example"],
        "year": 2024,
        "venue": None,
        "arxiv": "2304.14118",
        "code": None,
        "keywords": [],
        "data": [],
        "claims": [claim | {"check": CHECK}],
    }
    return paper | changes


def claim(**changes: Any) -> dict[str, Any]:
    content = ledger()["claims"][0] | changes
    return {key: value for key, value in content.items() if value is not None}


def write(folder: Path, content: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "paper.yaml").write_text(yaml.safe_dump(content))
    return folder


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "pyproject.toml").touch()
    for name in ("cape", "alpha", "_template", ".hidden"):
        write(tmp_path / "papers" / name, ledger())
    (tmp_path / "papers" / "notes").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_full_ledger(tmp_path: Path) -> None:
    data = {
        "name": "Set",
        "url": "https://example.org",
        "licence": "CC BY 4.0",
        "gate": "write to the authors",
        "files": [{"name": "a.h5", "url": "https://example.org/a", "sha256": "0" * 64, "size": 3}],
    }
    beats = {"kind": "beats", "metric": "error", "better": "lower", "model": ["a", "b"], "over": "c"}
    full = claim(
        headline=True,
        check=None,
        checks=[beats | {"datasets": ["x", "y"], "where": {"parameter": 0.1, "split": ["test"]}}, CHECK],
        reference=[{"label": "paper", "value": 0.1, "recalled": True}],
        profiles=["gpu"],
        gate={"metric": "accuracy", "model": "a", "dataset": "x", "at_least": 0.5},
    )
    untested = claim(id="C2", check=None, untested="needs the authors' hardware")
    paper = load_paper(write(tmp_path, ledger(data=[data], claims=[full, untested])))
    first, second = paper.claims
    assert first.all_checks()[0].all_pairs() == [("a", "c"), ("b", "c")]
    assert first.all_checks()[0].where == {"parameter": (0.1,), "split": ("test",)}
    assert first.all_checks()[1].datasets == ("test",)
    assert second.all_checks() == ()
    assert paper.data[0].files[0].size == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"titel": "x"}, "titel: unknown key"),
        ({"arxiv": 2304.14118}, "arxiv: .*string"),
        ({"year": "soon"}, "year"),
        ({"claims": []}, "claims"),
        ({"claims": [claim(), claim()]}, "given twice: C1"),
        ({"claims": [claim(), claim(id="C2", headline=True)]}, "headline claims come first"),
        ({"claims": [claim(check=None)]}, "exactly one of 'check', 'checks' and 'untested"),
        ({"claims": [claim(untested="why")]}, "exactly one of"),
        ({"claims": [claim(check=CHECK | {"kind": "wins"})]}, r"claims\.0\.check: .*beats"),
        ({"claims": [claim(check=CHECK | {"at_moost": 2})]}, r"claims\.0\.check\.threshold\.at_moost"),
        ({"claims": [claim(check=CHECK | {"at_most": None})]}, "give at_least, at_most or both"),
        ({"claims": [claim(check=CHECK | {"at_least": 2})]}, "nothing lies between"),
        ({"claims": [claim(mark="heard")]}, "mark"),
        ({"claims": [claim(id="no spaces")]}, "id"),
    ],
)
def test_mistakes_name_file_and_key(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_paper(write(tmp_path, ledger(**changes)))
    assert str(tmp_path / "paper.yaml") in str(caught.value)


BEATS = {"kind": "beats", "metric": "error", "better": "lower", "datasets": ["x"]}


@pytest.mark.parametrize(
    ("check", "message"),
    [
        (BEATS, "give either 'pairs"),
        (BEATS | {"model": "a"}, "give either 'pairs"),
        (BEATS | {"model": "a", "over": "b", "pairs": [{"model": "a", "over": "b"}]}, "give either 'pairs"),
        (BEATS | {"model": "a", "over": ["a", "b"]}, "cannot beat itself"),
        (BEATS | {"model": "a", "over": "b", "margin": -0.1}, "margin"),
        (BEATS | {"model": "a", "over": "b", "datasets": []}, "datasets"),
        ({"kind": "equals", "metric": "m", "model": "a", "datasets": ["x"], "value": 1}, "tolerance"),
    ],
)
def test_checks_that_say_too_little_or_too_much(tmp_path: Path, check: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_paper(write(tmp_path, ledger(claims=[claim(check=check)])))


def test_broken_or_missing_ledger(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="missing"):
        load_paper(tmp_path)
    (tmp_path / "paper.yaml").write_text("title: [unclosed\n")
    with pytest.raises(UserError, match="not valid YAML"):
        load_paper(tmp_path)


def test_finding_papers(repository: Path) -> None:
    assert [folder.name for folder in find_papers(repository)] == ["alpha", "cape"]


def test_resolving_names(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cape = repository / "papers" / "cape"
    for argument in ("cape", "papers/cape", "papers/cape/", str(cape), cape):
        assert resolve_folder(argument) == cape
    monkeypatch.chdir(cape)
    assert resolve_folder() == cape
    assert resolve_folder("alpha") == repository / "papers" / "alpha"


def test_unknown_papers_list_the_known(repository: Path) -> None:
    with pytest.raises(UserError, match=r"no paper 'papers/capee' \(did you mean cape\?\); there are alpha, cape"):
        resolve_folder("papers/capee")
    with pytest.raises(UserError, match="name one of alpha, cape"):
        resolve_folder()
