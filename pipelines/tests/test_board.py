"""The scoreboard: what it collects, and that its table and page stay whole whatever the papers say."""

from __future__ import annotations

import base64
import json
import struct
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines.board import (
    BEGIN,
    END,
    Entry,
    _rows_view,
    collect,
    duration,
    readme_table,
    track,
    update_readme,
    write_html,
)
from pipelines.claims import Comparison
from shared.config import UserError
from shared.evaluation.scores import code_digest, params_digest

EVIL = "<script>alert('x')</script> & \"q\" | [p](http://evil.example)"
PNG = b"\x89PNG\r\n\x1a\n" + struct.pack(">I4sIIBBBBB", 13, b"IHDR", 640, 200, 8, 2, 0, 0, 0)
SEED = {"seed": 0}


def comparison(verdict: str = "holds", **changes: Any) -> dict[str, Any]:
    content = {
        "kind": "beats",
        "metric": "nrmse",
        "dataset": "advection/seen",
        "model": "new",
        "over": "base",
        "quantity": "improvement",
        "estimate": 0.5,
        "low": 0.25,
        "high": 0.75,
        "at_least": 0.0,
        "means": {"new": 0.1, "base": 0.2},
        "seeds": 3,
        "verdict": verdict,
        "reason": "as claimed",
    }
    return content | changes


def write_paper(
    root: Path, slug: str, results: dict[str, dict[str, str]], sources: dict[str, str] | None = None, **changes: Any
) -> Path:
    """A paper with claims C1 to C3 and, per profile, its verdicts by claim."""
    folder = root / "papers" / slug
    folder.mkdir(parents=True)
    claim = {"statement": "It is better.", "place": "abstract", "figures": "half the error", "mark": "read"}
    check = {"kind": "threshold", "metric": "nrmse", "datasets": "advection/seen", "model": "new", "at_most": 1.0}
    ledger = {
        "title": slug.capitalize(),
        "authors": ["A. Author"],
        "year": 2023,
        "venue": "ICML 2023",
        "arxiv": "2304.14118",
        "code": {"url": "https://code.example/cape", "licence": "MIT"},
        "keywords": ["neural operators"],
        "data": [],
        "claims": [{"id": name, "check": check, **claim} for name in ("C1", "C2")]
        + [{"id": "C3", "untested": "needs a gated corpus", **claim}],
    }
    (folder / "paper.yaml").write_text(yaml.safe_dump(ledger | changes))
    (folder / "params.yaml").write_text(yaml.safe_dump({"profile": "small"} | dict.fromkeys(results, SEED)))
    (folder / "model.py").write_text("width = 20\n")
    for profile, verdicts in results.items():
        place = folder / "results" / profile
        place.mkdir(parents=True)
        metrics = {
            "data_source": (sources or {}).get(profile, "generated: exact advection"),
            "device": "CPU, 2 cores",
            "wall_time_seconds": 250,
            "created": "2025-01-02T03:04:05+00:00",
            "digest": {"code": code_digest(folder), "params": params_digest(SEED)},
        }
        claims = [
            {
                "id": name,
                "headline": False,
                "statement": "It is better.",
                "verdict": verdict,
                "reason": f"because of {profile}",
                "comparisons": [] if verdict == "untested" else [comparison(verdict)],
            }
            for name, verdict in verdicts.items()
        ]
        (place / "metrics.json").write_text(json.dumps(metrics))
        (place / "verdict.json").write_text(json.dumps({"paper": slug, "profile": profile, "claims": claims}))
        (place / "error_over_time.png").write_bytes(PNG)
    return folder


def entries_by_slug(root: Path) -> dict[str, Entry]:
    return {entry.slug: entry for entry in collect(root)}


class Page(HTMLParser):
    """The tags of a page with their attributes, and its text outside of scripts and styles."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if not self.tags or self.tags[-1][0] not in ("script", "style"):
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def test_strongest_tested_evidence_counts(tmp_path: Path) -> None:
    write_paper(
        tmp_path,
        "cape",
        {
            "small": {"C1": "holds", "C2": "holds", "C3": "untested"},
            "real": {"C1": "contradicted", "C2": "untested", "C3": "untested"},
        },
        {"real": "real: PDEBench"},
    )
    entry = entries_by_slug(tmp_path)["cape"]
    assert [result.profile for result in entry.results] == ["real", "small"]
    assert [(judged.outcome, judged.result.profile) for judged in entry.claims] == [
        ("contradicted", "real"),
        ("holds", "small"),
        ("untested", "real"),
    ]
    assert entry.counts == {"holds": 1, "contradicted": 1, "inconclusive": 0, "untested": 1}


def test_paper_without_results_and_claim_added_later(tmp_path: Path) -> None:
    write_paper(tmp_path, "new", {})
    write_paper(tmp_path, "partial", {"small": {"C1": "holds"}})
    entries = entries_by_slug(tmp_path)
    assert [judged.reason for judged in entries["new"].claims] == ["no run has been judged yet"] * 2 + [
        "needs a gated corpus"
    ]
    assert entries["partial"].counts == {"holds": 1, "contradicted": 0, "inconclusive": 0, "untested": 2}
    assert "not run yet" in readme_table([entries["new"]])


def test_broken_papers_do_not_stop_the_others(tmp_path: Path) -> None:
    write_paper(tmp_path, "good", {"small": {"C1": "holds"}})
    for slug, file, content in [
        ("yaml", "paper.yaml", "title: [unclosed"),
        ("schema", "paper.yaml", "titel: misspelt"),
        ("verdict", "results/small/verdict.json", '{"paper": "cut o'),
        ("metrics", "results/small/metrics.json", "{}"),
        ("binary", "paper.yaml", "\udcff"),
        ("syntax", "model.py", "def ("),
    ]:
        folder = write_paper(tmp_path, slug, {"small": {"C1": "holds"}})
        (folder / file).write_text(content, errors="surrogateescape")
    entries = entries_by_slug(tmp_path)
    assert entries["good"].error is None
    for slug, file in [("yaml", "paper.yaml"), ("verdict", "verdict.json"), ("metrics", "metrics.json")]:
        assert f"papers/{slug}" in entries[slug].error
        assert file in entries[slug].error
        assert str(tmp_path) not in entries[slug].error
    assert all(entries[slug].error for slug in ("schema", "binary", "syntax"))
    assert entries["verdict"].paper is not None, "what can be read of the paper is shown"
    page = Page(write_html(tmp_path, list(entries.values()), tmp_path / "index.html"))
    assert len([tag for tag in page.all("details") if tag.get("class") == "paper"]) == len(entries)
    assert "titel" in page.text
    assert len(readme_table(entries.values()).splitlines()) == 2 + len(entries) + 2


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("model.py", "width = 36\n", "the code changed"),
        ("params.yaml", "profile: small\nsmall: {seed: 1}\n", "the profile's params changed"),
        ("params.yaml", "profile: tiny\ntiny: {seed: 0}\n", "no profile 'small'"),
        ("model.py", '"""A docstring."""\nwidth = 20  # as in the paper\n', None),
        ("params.yaml", "profile: other\nother: {seed: 5}\nsmall: {seed: 0}\n", None),
    ],
)
def test_stale_results(tmp_path: Path, file: str, content: str, reason: str | None) -> None:
    folder = write_paper(tmp_path, "cape", {"small": {"C1": "holds"}})
    (folder / file).write_text(content)
    entry = entries_by_slug(tmp_path)["cape"]
    page = Page(write_html(tmp_path, [entry], tmp_path / "index.html"))
    if reason is None:
        assert entry.best.stale is None
        assert "older than its code" not in page.text + readme_table([entry])
    else:
        assert reason in entry.best.stale
        assert "older than its code" in readme_table([entry])
        assert reason in page.text


def test_readme_row(tmp_path: Path) -> None:
    write_paper(tmp_path, "cape", {"small": {"C1": "holds", "C2": "inconclusive", "C3": "untested"}})
    assert readme_table(collect(tmp_path)).splitlines()[2] == (
        "| [Cape](papers/cape/README.md) (2023) | neural operators | ✔ 1 ✘ 0 ~ 1 – 1 "
        "| small (generated: exact advection) | 4 min 10 s |"
    )


def test_update_readme_is_idempotent(tmp_path: Path) -> None:
    write_paper(tmp_path, "cape", {})
    readme = tmp_path / "README.md"
    readme.write_text(f"# Above\n{BEGIN}\nold table\n{END}\nBelow\n")
    update_readme(tmp_path, collect(tmp_path))
    first = readme.read_text()
    assert first.startswith(f"# Above\n{BEGIN}\n| Paper |")
    assert first.endswith(f"\n{END}\nBelow\n")
    assert "old table" not in first
    update_readme(tmp_path, collect(tmp_path))
    assert readme.read_text() == first


@pytest.mark.parametrize("text", [None, "no markers", BEGIN, f"{END}{BEGIN}", f"{BEGIN}{BEGIN}{END}"])
def test_readme_without_its_markers(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "README.md").write_text(text)
    with pytest.raises(UserError, match="board:begin"):
        update_readme(tmp_path, [])


def test_everything_is_escaped(tmp_path: Path) -> None:
    folder = write_paper(
        tmp_path,
        "evil",
        {"small": {"C1": "holds"}},
        {"small": EVIL},
        title=EVIL,
        authors=[EVIL],
        keywords=[EVIL],
        code={"url": "javascript:alert(1)", "licence": "MIT"},
    )
    (folder / "results/small" / '"><img src=x>.png').write_bytes(PNG)
    entry = entries_by_slug(tmp_path)["evil"]
    page = Page(write_html(tmp_path, [entry], tmp_path / "index.html"))
    assert EVIL in page.text
    assert len(page.all("script")) == 1, "the page's own"
    assert not any("javascript" in (link["href"] or "") for link in page.all("a"))
    assert all(image["src"] is None or image["src"].startswith("data:") for image in page.all("img") if "src" in image)
    (row,) = [line for line in readme_table([entry]).splitlines() if "script" in line]
    assert "<script>" not in row
    assert row.replace("\\|", "").count("|") == 6
    assert r"\[p\](http" in row, "its brackets make no link"


def test_page_stands_alone(tmp_path: Path) -> None:
    write_paper(tmp_path, "cape", {"small": {"C1": "holds"}, "real": {"C1": "holds"}})
    page = Page(write_html(tmp_path, collect(tmp_path), tmp_path / "board/index.html"))
    assert not page.all("link")
    assert all("src" not in script for script in page.all("script"))
    pictures = [image["src"] for image in page.all("img") if "src" in image]
    assert pictures == [f"data:image/png;base64,{base64.b64encode(PNG).decode()}"] * 2
    for tag, attributes in page.tags:
        for name, value in attributes.items():
            if "http" in (value or ""):
                assert (tag, name) == ("a", "href"), "nothing but a link leads to another place"
    links = {link["href"] for link in page.all("a")}
    assert links == {"https://arxiv.org/abs/2304.14118", "https://code.example/cape"}
    (policy,) = [meta["content"] for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; img-src data:;")


def test_page_of_no_papers(tmp_path: Path) -> None:
    (tmp_path / "papers").mkdir()
    page = Page(write_html(tmp_path, collect(tmp_path), tmp_path / "index.html"))
    assert "There are no papers yet." in page.text


def test_numbers_on_the_page(tmp_path: Path) -> None:
    write_paper(tmp_path, "cape", {"small": {"C1": "holds"}})
    page = Page(write_html(tmp_path, collect(tmp_path), tmp_path / "index.html"))
    for words in ("half the error [read]", "new 0.1 against base 0.2", "50 % [25 %, 75 %]", "make papers/cape"):
        assert words in page.text


def test_rows_are_drawn_on_one_scale() -> None:
    values = [
        comparison(estimate=0.5, low=0.0, high=1.0, at_least=0.25),
        comparison(estimate=-1.0, low=-1.0, high=-1.0, at_least=None, at_most=0.0),
        comparison(estimate=None, low=None, high=None, quantity=None, reason="only 2 seeds"),
    ]
    first, second, third = _rows_view([Comparison.model_validate(value) for value in values])
    # From -1 to 1 with 6 % to either side: -1.12 to 1.12.
    assert first["plot"]["dot"] == pytest.approx(100 * 1.62 / 2.24, abs=0.01)
    assert first["plot"]["low"] == pytest.approx(50)
    assert first["plot"]["low"] + first["plot"]["width"] == pytest.approx(100 * 2.12 / 2.24, abs=0.02)
    assert second["plot"]["dot"] == pytest.approx(100 * 0.12 / 2.24, abs=0.01)
    assert first["plot"]["to"] > 100, "no border on the open side"
    assert second["plot"]["from"] < 0
    assert (second["plot"]["width"], second["value"]) == (0, "−100 %")
    assert (third["plot"], third["value"]) == (None, "only 2 seeds")


def test_a_single_value_has_a_scale() -> None:
    (row,) = _rows_view([Comparison.model_validate(comparison(estimate=2.0, low=2.0, high=2.0, at_least=2.0))])
    assert row["plot"]["dot"] == 50


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.4, "0 s"), (59.4, "59 s"), (59.6, "1 min"), (250, "4 min 10 s"), (3600, "1 h 0 min"), (9000, "2 h 30 min")],
)
def test_duration(seconds: float, words: str) -> None:
    assert duration(seconds) == words


class FakeTracking:
    """Stands in for the tracking store: what each run was told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.told: list[tuple[str, str]] = []
        self.tags: dict[str, dict[str, str]] = {}
        self.steps: list[int] = []
        monkeypatch.setattr("shared.tracking.start_run", lambda experiment, name: self._run("start", f"run of {name}"))
        monkeypatch.setattr("shared.tracking.open_run", lambda run_id: self._run("open", run_id))
        monkeypatch.setattr("shared.tracking.deliver", lambda: self)

    def _run(self, how: str, run_id: str) -> FakeTracking:
        self.id = run_id
        self.told.append((how, run_id))
        return self

    def __enter__(self) -> FakeTracking:
        return self

    def __exit__(self, *arguments: object) -> None:
        pass

    def set_tags(self, tags: dict[str, str]) -> None:
        self.tags[self.id] = tags

    def log(self, metrics: dict[str, float], step: int) -> None:
        self.steps.append(step)

    def log_artifact(self, path: Path, folder: str) -> None:
        assert path.is_file()


def test_tracking_tells_what_has_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REPRISE_TRACKING", "on")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracking.example")
    store = FakeTracking(monkeypatch)
    write_paper(tmp_path, "one", {"small": {"C1": "holds"}})
    two = write_paper(tmp_path, "two", {"small": {"C1": "holds"}})
    track(tmp_path, collect(tmp_path))
    assert store.told == [("start", "run of one"), ("start", "run of two")]
    assert store.tags["run of two"]["claim/C1"] == "holds"
    store.told.clear()
    track(tmp_path, collect(tmp_path))
    assert store.told == []
    (two / "model.py").write_text("width = 36\n")
    track(tmp_path, collect(tmp_path))
    assert store.told == [("open", "run of two")]
    assert "the code changed" in store.tags["run of two"]["stale"]
    assert store.steps[-1] == 1
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://another.example")
    store.told.clear()
    track(tmp_path, collect(tmp_path))
    assert [how for how, _ in store.told] == ["start", "start"]


def test_tracking_starts_anew_when_the_database_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REPRISE_TRACKING", "on")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    store = FakeTracking(monkeypatch)
    write_paper(tmp_path, "one", {})
    for _ in range(2):
        track(tmp_path, collect(tmp_path))
    assert store.told == [("start", "run of one")] * 2


def test_tracking_switched_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REPRISE_TRACKING", "off")
    store = FakeTracking(monkeypatch)
    write_paper(tmp_path, "one", {})
    track(tmp_path, collect(tmp_path))
    assert store.told == []
    assert not (tmp_path / ".reprise").exists()
