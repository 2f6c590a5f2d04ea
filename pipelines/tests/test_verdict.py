from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from rich.console import Console

from pipelines.verdict import (
    BEGIN,
    END,
    judge,
    load_verdict,
    print_verdict,
    profiles_by_strength,
    write_verdict,
)
from shared.config import UserError
from shared.evaluation.scores import write_scores

VALUES = {"base": [2.0, 2.1, 1.9], "ours": [1.0, 1.2, 0.8]}


def claim(name: str, **settings: Any) -> dict[str, Any]:
    return {
        "id": name,
        "statement": f"Statement {name}.",
        "place": "Table 1",
        "figures": "−50 %",
        "mark": "read",
    } | settings


BEATS = {"kind": "beats", "metric": "error", "better": "lower", "model": "ours", "over": "base", "datasets": ["test"]}
CLAIMS = [
    claim("C1", headline=True, statement="Ours | beats base.", check=BEATS),
    claim("C2", check={"kind": "threshold", "metric": "error", "model": "base", "datasets": ["test"], "at_most": 1}),
    claim("C3", untested="needs a robot"),
    claim("C4", check=BEATS | {"margin": 0.5}),
]


def write_results(folder: Path, profile: str, values: dict[str, list[float]] = VALUES, **metrics: Any) -> None:
    rows = [(model, "test", "error", seed, v) for model, seeds in values.items() for seed, v in enumerate(seeds)]
    frame = pd.DataFrame(rows, columns=["model", "dataset", "metric", "seed", "value"])
    write_scores(folder / "results" / profile / "scores.csv", frame)
    content = {"data_source": "generated: a test", "device": "CPU", "wall_time_seconds": 252.0} | metrics
    (folder / "results" / profile / "metrics.json").write_text(json.dumps(content))


@pytest.fixture
def paper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("REPRISE_TRACKING", "off")
    folder = tmp_path / "paper"
    folder.mkdir()
    write_ledger(folder, CLAIMS)
    (folder / "params.yaml").write_text("profile: small\nsmall: {}\nlong: {}\nreal: {}\ngpu: {}\n")
    (folder / "README.md").write_text(f"# A paper\n\nBefore.\n\n{BEGIN}\n{END}\n\nAfter.\n")
    write_results(folder, "small")
    return folder


def write_ledger(folder: Path, claims: list[dict[str, Any]]) -> None:
    paper = {"title": "A paper", "authors": ["A"], "year": 2024, "venue": None, "arxiv": None, "code": None}
    (folder / "paper.yaml").write_text(yaml.safe_dump(paper | {"keywords": [], "data": [], "claims": claims}))


def test_judging_every_claim(paper: Path) -> None:
    verdict = judge(paper)
    assert (verdict.paper, verdict.profile) == ("paper", "small")
    outcomes = {claim.id: claim.verdict for claim in verdict.claims}
    assert outcomes == {"C1": "holds", "C2": "contradicted", "C3": "untested", "C4": "inconclusive"}
    assert verdict.counts() == {"holds": 1, "contradicted": 1, "inconclusive": 1, "untested": 1}
    assert [claim.headline for claim in verdict.claims] == [True, False, False, False]


def test_verdict_file_is_the_same_every_time(paper: Path) -> None:
    path = paper / "results" / "small" / "verdict.json"
    verdict = write_verdict(paper)
    first = path.read_bytes()
    path.unlink()
    write_verdict(paper)
    assert path.read_bytes() == first
    assert load_verdict(paper, "small") == verdict
    content = json.loads(first)
    assert list(content) == ["paper", "profile", "claims"]
    comparison = content["claims"][0]["comparisons"][0]
    assert comparison["estimate"] == pytest.approx(0.5)
    assert comparison["means"] == {"ours": 1.0, "base": 2.0}


def test_readme_block(paper: Path) -> None:
    (paper / "results" / "small" / "error_over_time.png").touch()
    write_verdict(paper)
    readme = (paper / "README.md").read_text()
    assert readme.startswith(
        f"# A paper\n\nBefore.\n\n{BEGIN}\n\n**Profile `small`** · generated: a test · CPU · 4 min 12 s"
    )
    assert readme.endswith(f"\n\n{END}\n\nAfter.\n")
    assert (
        "| C1 | Ours \\| beats base. | −50 % (read; Table 1) | "
        "error, test: ours 1 vs base 2; improvement +50 % [+37 %, +63 %] | **✔ holds** |" in readme
    )
    assert "| C3 | Statement C3. | −50 % (read; Table 1) | needs a robot | **– untested** |" in readme
    assert "error, lower is better; mean ± standard deviation over seeds" in readme
    assert "| `ours` | **1 ± 0.2** |" in readme
    assert "| `base` | 2 ± 0.1 |" in readme
    assert "error, test: base 2 [1.73, 2.27], claimed ≤ 1 | **✘ contradicted** |" in readme
    assert "![error over time](results/small/error_over_time.png)" in readme
    # Every row of a table has as many cells as its header.
    rows = [line.replace("\\|", "") for line in readme.splitlines() if line.startswith("|")]
    assert {row.count("|") for row in rows} == {6, 3}

    write_verdict(paper)
    assert (paper / "README.md").read_text() == readme


def test_the_strongest_profile_comes_first(paper: Path) -> None:
    for profile in ("long", "gpu", "real"):
        write_results(paper, profile)
        write_verdict(paper, profile)
    write_verdict(paper, "small")
    assert profiles_by_strength(paper) == ["real", "gpu", "long", "small"]
    write_results(paper, "gpu", data_source="real: official files")
    assert profiles_by_strength(paper) == ["gpu", "real", "long", "small"]
    write_verdict(paper)
    readme = (paper / "README.md").read_text()
    assert readme.index("**Profile `gpu`**") < readme.index("<code>real</code>") < readme.index("<code>small</code>")
    assert readme.count("<details>") == readme.count("</details>") == 3


def test_a_claim_newer_than_another_profiles_verdict(paper: Path) -> None:
    write_results(paper, "real")
    write_verdict(paper, "real")
    write_ledger(paper, [*CLAIMS, claim("C5", untested="new")])
    write_verdict(paper)
    assert "| **not judged yet** |" in (paper / "README.md").read_text()


def test_runs_that_diverged_show(paper: Path) -> None:
    write_results(paper, "small", {"base": [2.0, float("nan"), 1.9], "ours": [1.0, 1.1, 0.9]})
    verdict = write_verdict(paper)
    assert verdict.claims[0].verdict == "inconclusive"
    readme = (paper / "README.md").read_text()
    assert "base not finite; error of base is not a finite number in seed 1" in readme
    assert "| `base` | not finite in 1 of 3 seeds |" in readme


@pytest.mark.parametrize("text", ["", BEGIN, f"{END}\n{BEGIN}", f"{BEGIN}\n{END}\n{BEGIN}\n{END}"])
def test_a_readme_without_place_stops_before_anything_is_written(paper: Path, text: str) -> None:
    (paper / "README.md").write_text(text)
    with pytest.raises(UserError, match="has no place for results: it needs the lines"):
        write_verdict(paper)
    assert not (paper / "results" / "small" / "verdict.json").exists()
    assert (paper / "README.md").read_text() == text


def test_missing_readme(paper: Path) -> None:
    (paper / "README.md").unlink()
    with pytest.raises(UserError, match=r"README\.md is missing"):
        write_verdict(paper)


def test_all_claims_that_do_not_fit_the_scores_are_named(paper: Path) -> None:
    wrong = [claim("C1", check=BEATS | {"model": "our"}), claim("C2", check=BEATS | {"metric": "errors"})]
    write_ledger(paper, wrong)
    with pytest.raises(UserError, match="does not fit") as caught:
        judge(paper)
    assert "claim C1: scores.csv has no model 'our' (did you mean ours?); it has base, ours" in str(caught.value)
    assert "claim C2: scores.csv has no metric 'errors'" in str(caught.value)


def test_unknown_profiles(paper: Path) -> None:
    with pytest.raises(UserError, match=r"profile 'tiny'; choose one of small, long, real, gpu"):
        judge(paper, "tiny")
    with pytest.raises(UserError, match=r"scores\.csv is missing"):
        judge(paper, "long")
    write_ledger(paper, [claim("C1", check=BEATS, profiles=["gpuu"])])
    with pytest.raises(UserError, match="claim C1 names profile 'gpuu'"):
        judge(paper)


def test_damaged_verdict_of_another_profile(paper: Path) -> None:
    write_results(paper, "long")
    (paper / "results" / "long" / "verdict.json").write_text('{"paper": ')
    with pytest.raises(UserError, match=r"verdict\.json is cut off or damaged"):
        write_verdict(paper)


def test_printed_table(paper: Path) -> None:
    console = Console(file=io.StringIO(), width=140)
    print_verdict(judge(paper), console)
    printed = console.file.getvalue()
    for words in ("✔ holds", "✘ contradicted", "~ inconclusive", "– untested", "Ours | beats base.", "1 untested"):
        assert words in printed


def test_the_evaluated_run_is_tagged(paper: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from shared import tracking

    calls: dict[str, Any] = {}

    class Recorder:
        def __enter__(self) -> Recorder:
            return self

        def __exit__(self, *error: object) -> None:
            calls["closed"] = True

        def set_tags(self, tags: dict[str, str]) -> None:
            calls["tags"] = tags

    monkeypatch.setattr(tracking, "open_run", lambda run_id: calls.update(run=run_id) or Recorder())
    write_verdict(paper)
    assert calls == {}
    timing = paper / "runs" / "timing" / "small"
    timing.mkdir(parents=True)
    (timing / "evaluate.json").write_text('{"run_id": "abc"}')
    write_verdict(paper)
    assert (calls["run"], calls["closed"]) == ("abc", True)
    assert calls["tags"]["claim/C1"] == "holds"
    assert calls["tags"]["verdict/holds"] == "1"
