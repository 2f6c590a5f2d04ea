"""The scoreboard over all papers: README table, a page that stands alone, and the MLflow experiment `scoreboard`."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.claims import OUTCOMES, ClaimVerdict, Comparison
from pipelines.papers import Claim, Paper, find_papers, load_paper
from pipelines.verdict import SYMBOLS, load_metrics, load_verdict, profiles_by_strength
from shared.config import UserError, read_yaml
from shared.files import write_json, write_text

BEGIN, END = "<!-- board:begin -->", "<!-- board:end -->"
EXPERIMENT = "scoreboard"


@dataclass(frozen=True)
class Result:
    """What one profile of a paper came to. `stale` says what has changed since, None if nothing has."""

    profile: str
    data_source: str
    device: str
    wall_time_seconds: float
    created: str
    stale: str | None
    verdicts: dict[str, ClaimVerdict]
    figures: tuple[Path, ...]


@dataclass(frozen=True)
class Judged:
    """A claim with the strongest verdict on it, and the result that gave it; None for both if no profile was judged."""

    claim: Claim
    verdict: ClaimVerdict | None
    result: Result | None

    @property
    def outcome(self) -> str:
        return self.verdict.verdict if self.verdict else "untested"

    @property
    def reason(self) -> str:
        return self.verdict.reason if self.verdict else self.claim.untested or "no run has been judged yet"


@dataclass(frozen=True)
class Entry:
    """A paper on the board: its results, strongest first, and what could not be read, if anything."""

    slug: str
    folder: Path
    paper: Paper | None
    results: tuple[Result, ...] = ()
    errors: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        return self.paper.title if self.paper else self.slug

    @property
    def error(self) -> str | None:
        return "\n".join(self.errors) or None

    @property
    def best(self) -> Result | None:
        return self.results[0] if self.results else None

    @property
    def claims(self) -> list[Judged]:
        """Every claim with the verdict of the strongest profile that tested it."""
        return [self._judged(claim) for claim in self.paper.claims] if self.paper else []

    @property
    def counts(self) -> dict[str, int]:
        """Number of claims by outcome."""
        counts = Counter(judged.outcome for judged in self.claims)
        return {outcome: counts[outcome] for outcome in OUTCOMES}

    def _judged(self, claim: Claim) -> Judged:
        verdicts = [(result.verdicts[claim.id], result) for result in self.results if claim.id in result.verdicts]
        tested = [pair for pair in verdicts if pair[0].verdict != "untested"]
        verdict, result = (tested or verdicts or [(None, None)])[0]
        return Judged(claim, verdict, result)


# ------------------------------------------------------------------------------------------------------- collecting


def collect(root: Path) -> list[Entry]:
    """Read all papers and their results; one that cannot be read becomes an entry that says why."""
    return [_entry(root, folder) for folder in find_papers(root)]


def _entry(root: Path, folder: Path) -> Entry:
    errors: list[str] = []

    def attempt(read: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return read(*arguments)
        except (UserError, OSError) as error:
            # The board is committed and passed on: it names no folder of the machine it was made on.
            errors.append(str(error).replace(f"{root}/", ""))
        return None

    paper = attempt(load_paper, folder)
    profiles = attempt(profiles_by_strength, folder) or []
    results = [attempt(_result, folder, profile) for profile in profiles]
    return Entry(folder.name, folder, paper, tuple(filter(None, results)), tuple(errors))


def _result(folder: Path, profile: str) -> Result:
    verdict, metrics = load_verdict(folder, profile), load_metrics(folder, profile)
    results = folder / "results" / profile
    try:
        return Result(
            profile=profile,
            data_source=str(metrics["data_source"]),
            device=str(metrics["device"]),
            wall_time_seconds=float(metrics["wall_time_seconds"]),
            created=str(metrics["created"]),
            stale=_stale(folder, profile, metrics["digest"]),
            verdicts={claim.id: claim for claim in verdict.claims},
            figures=tuple(sorted(results.glob("*.png"))),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{results / 'metrics.json'} lacks an entry or has one of the wrong kind: {error!r}") from None


def _stale(folder: Path, profile: str, digests: dict[str, str]) -> str | None:
    """What has changed in the folder since the results of a profile were made."""
    from shared.evaluation.scores import code_digest, params_digest

    sections = read_yaml(folder / "params.yaml")
    if not isinstance(sections, dict) or profile not in sections:
        return f"params.yaml has no profile {profile!r} any more"
    changed = []
    if digests["code"] != code_digest(folder):
        changed.append("the code")
    if digests["params"] != params_digest(sections[profile]):
        changed.append("the profile's params")
    return f"{' and '.join(changed)} changed since" if changed else None


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None


# ----------------------------------------------------------------------------------------------------- README table


def readme_table(entries: Iterable[Entry]) -> str:
    """The board as a Markdown table."""
    lines = [
        "| Paper | Field | Claims | Evidence | Run time |",
        "|---|---|---|---|---|",
    ]
    lines += [_readme_row(entry) for entry in entries]
    legend = ", ".join(f"{SYMBOLS[outcome]} {outcome}" for outcome in OUTCOMES)
    return "\n".join([*lines, "", f"Claims: {legend}."])


def _readme_row(entry: Entry) -> str:
    title = f"[{_markdown(entry.title)}](papers/{entry.slug}/README.md)"
    if entry.paper:
        title += f" ({entry.paper.year})"
    counts = " ".join(f"{SYMBOLS[outcome]} {count}" for outcome, count in entry.counts.items())
    evidence = [_markdown(_evidence(entry))]
    if any(result.stale for result in entry.results):
        evidence.append("**older than its code**")
    if entry.errors:
        evidence.append(f"⚠ {_markdown(entry.errors[0].splitlines()[0])}")
    cells = [
        title,
        _markdown(", ".join(entry.paper.keywords)) if entry.paper else "",
        counts if entry.paper else "",
        "; ".join(filter(None, evidence)),
        duration(entry.best.wall_time_seconds) if entry.best else "",
    ]
    return f"| {' | '.join(cells)} |"


def update_readme(root: Path, entries: Iterable[Entry]) -> None:
    """Write the table between the board's markers in the root README.md."""
    path = root / "README.md"
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise UserError(f"{path} needs one line {BEGIN} and below it one line {END}: the table goes between them")
    before, after = text[: text.index(BEGIN)], text[text.index(END) :]
    updated = f"{before}{BEGIN}\n{readme_table(entries)}\n{after}"
    if updated != text:
        write_text(path, updated)


def _markdown(text: str) -> str:
    """Text as it is, inside a table cell: no markup, no HTML, one line."""
    return re.sub(r"([\\`*_\[\]|])", r"\\\1", html.escape(" ".join(text.split()), quote=False))


def _evidence(entry: Entry) -> str:
    if entry.best:
        return f"{entry.best.profile} ({entry.best.data_source})"
    return "" if entry.errors else "not run yet"


def duration(seconds: float) -> str:
    """A run time in words, such as `4 min 10 s`."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes == 0:
        return f"{rest} s"
    if minutes < 60:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min"


# -------------------------------------------------------------------------------------------------------- HTML page


def write_html(root: Path, entries: Sequence[Entry], path: Path) -> Path:
    """Write the board as one HTML file that needs no other: styles, script and figures are inside. Returns its path."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    totals = {outcome: sum(entry.counts[outcome] for entry in entries) for outcome in OUTCOMES}
    page = environment.get_template("board.html").render(
        papers=sorted((_paper_view(entry) for entry in entries), key=lambda view: view["title"].lower()),
        totals=totals,
        verdicts=OUTCOMES,
        symbols=SYMBOLS,
    )
    write_text(path, page)
    return path


def _paper_view(entry: Entry) -> dict[str, Any]:
    """What the template shows of a paper."""
    paper = entry.paper
    claims = [_claim_view(entry, judged) for judged in entry.claims]
    words = [entry.slug, entry.title, *(f"{claim['statement']} {claim['id']}" for claim in claims)]
    if paper:
        words += [*paper.authors, str(paper.year), paper.venue or "", *paper.keywords]
    return {
        "slug": entry.slug,
        "title": entry.title,
        "authors": _authors(paper.authors) if paper else "",
        "venue": paper.venue or str(paper.year) if paper else "",
        "year": paper.year if paper else 0,
        "keywords": paper.keywords if paper else (),
        "links": _links(paper) if paper else [],
        "error": entry.error,
        "counts": entry.counts,
        "claims": claims,
        "evidence": _evidence(entry),
        "run_time": duration(entry.best.wall_time_seconds) if entry.best else "",
        "seconds": entry.best.wall_time_seconds if entry.best else 0,
        "stale": any(result.stale for result in entry.results),
        "figures": [_figures_view(result) for result in entry.results if result.figures],
        "results": [
            {
                "profile": result.profile,
                "data_source": result.data_source,
                "device": result.device,
                "run_time": duration(result.wall_time_seconds),
                "created": result.created[:10],
                "stale": result.stale,
            }
            for result in entry.results
        ],
        "search": " ".join(words).lower(),
    }


def _authors(authors: Sequence[str]) -> str:
    return ", ".join(authors) if len(authors) <= 4 else f"{authors[0]} and {len(authors) - 1} others"


def _links(paper: Paper) -> list[dict[str, str]]:
    links = []
    if paper.arxiv:
        links.append({"label": f"arXiv {paper.arxiv}", "url": f"https://arxiv.org/abs/{paper.arxiv}"})
    # An address comes from a file that anyone may have written: nothing but a web page is linked.
    if paper.code and paper.code.url and re.match(r"https?://", paper.code.url):
        links.append({"label": "the authors' code", "url": paper.code.url})
    return links


def _claim_view(entry: Entry, judged: Judged) -> dict[str, Any]:
    claim, verdict, result = judged.claim, judged.verdict, judged.result
    comparisons = verdict.comparisons if verdict else ()
    others = [
        (other.profile, other.verdicts[claim.id].verdict) for other in entry.results if claim.id in other.verdicts
    ]
    return {
        "id": claim.id,
        "headline": claim.headline,
        "statement": claim.statement,
        "place": claim.place,
        "figures": claim.figures if claim.mark == "not obtained" else f"{claim.figures} [{claim.mark}]",
        "verdict": judged.outcome,
        "reason": judged.reason if judged.outcome in ("untested", "inconclusive") or not comparisons else "",
        "profile": result.profile if result else "",
        "numbers": _numbers_view(comparisons),
        "others": [
            {"profile": profile, "verdict": outcome}
            for profile, outcome in others
            if outcome != "untested" and profile != result.profile
        ],
    }


def _numbers_view(comparisons: Sequence[Comparison]) -> list[dict[str, Any]]:
    """Comparisons grouped by what they measure, each group drawn on one scale."""
    groups: dict[tuple[str, str | None], list[Comparison]] = {}
    for comparison in comparisons:
        groups.setdefault((comparison.metric, comparison.quantity), []).append(comparison)
    return [
        {
            "heading": f"{metric}: {quantity} [95 % interval]" if quantity else metric,
            "rows": _rows_view(group),
        }
        for (metric, quantity), group in groups.items()
    ]


def _rows_view(group: Sequence[Comparison]) -> list[dict[str, Any]]:
    """Rows of a forest plot: positions are in percent of the scale that all intervals and claimed borders span."""
    borders = [value for row in group for value in (row.low, row.high, row.estimate, row.at_least, row.at_most)]
    known = [value for value in borders if value is not None]
    start, stop = min(known, default=0.0), max(known, default=0.0)
    margin = 0.06 * (stop - start) or 1.0

    def place(value: float) -> float:
        return round(100 * (value - start + margin) / (stop - start + 2 * margin), 2)

    rows = []
    for row in group:
        view: dict[str, Any] = {
            "dataset": row.dataset,
            "models": " against ".join(f"{model} {_number(mean)}" for model, mean in row.means.items()) or row.model,
            "value": row.reason,
            "verdict": row.verdict,
            "plot": None,
        }
        if row.estimate is not None:
            low = row.estimate if row.low is None else row.low
            high = row.estimate if row.high is None else row.high
            percent = row.quantity == "improvement"
            value, *interval = (_number(number, percent=percent) for number in (row.estimate, low, high))
            view["value"] = f"{value} [{', '.join(interval)}]" if low != high else value
            # An open side of the claimed range lies beyond the edge, where its border is not seen.
            view["plot"] = {
                "dot": place(row.estimate),
                "low": place(low),
                "width": round(place(high) - place(low), 2),
                "from": -5 if row.at_least is None else place(row.at_least),
                "to": 105 if row.at_most is None else place(row.at_most),
            }
        rows.append(view)
    return rows


def _number(value: float | None, *, percent: bool = False) -> str:
    if value is None:
        return "not finite"
    text = f"{100 * value:.3g} %" if percent else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return text.replace("-", "−")


def _figures_view(result: Result) -> dict[str, Any]:
    figures = []
    for path in result.figures:
        content = path.read_bytes()
        figures.append(
            {
                "caption": path.stem.replace("_", " "),
                "data": base64.b64encode(content).decode(),
                # PNG puts both as big-endian integers behind its signature and the first chunk's head; the browser
                # keeps the place free with them.
                "width": int.from_bytes(content[16:20], "big"),
                "height": int.from_bytes(content[20:24], "big"),
            }
        )
    return {"profile": result.profile, "figures": figures}


# ----------------------------------------------------------------------------------------------------------- MLflow


def track(root: Path, entries: Iterable[Entry]) -> None:
    """Bring the MLflow experiment `scoreboard` up to date: one run a paper, told only what has changed.

    Which run is a paper's, and what it was last told, is kept in `.reprise/scoreboard.json`, by store.
    """
    from shared.tracking import deliver, open_run, start_run
    from shared.tracking.spool import database_path, enabled, public_uri, tracking_uri

    if not enabled():
        return
    path, store = root / ".reprise" / "scoreboard.json", public_uri(tracking_uri())
    told = _read_json(path) if path.is_file() else {}
    database = database_path(tracking_uri())
    if database is not None and not database.exists():
        told.pop(store, None)
    runs: dict[str, dict[str, Any]] = told.setdefault(store, {})
    digests = [(entry, _digest(entry)) for entry in entries]
    news = [(entry, digest) for entry, digest in digests if digest != runs.get(entry.slug, {}).get("digest")]
    if not news:
        return
    with deliver():
        for entry, digest in news:
            known = runs.get(entry.slug)
            step = known["step"] + 1 if known else 0
            with open_run(known["run"]) if known else start_run(EXPERIMENT, entry.slug) as run:
                run.set_tags(_tags(entry))
                run.log({f"claims/{outcome}": count for outcome, count in entry.counts.items()}, step)
                if entry.best:
                    run.log({"cost/wall_time_seconds": entry.best.wall_time_seconds}, step)
                    for figure in entry.best.figures:
                        run.log_artifact(figure, "figures")
            runs[entry.slug] = {"run": run.id, "digest": digest, "step": step}
    write_json(path, told)


def _tags(entry: Entry) -> dict[str, str]:
    """What a paper's run says; empty texts take back what an earlier update said."""
    best, paper = entry.best, entry.paper
    tags = {
        "title": entry.title,
        "profile": best.profile if best else "",
        "data_source": best.data_source if best else "",
        "stale": (best.stale or "") if best else "",
        "error": entry.error or "",
        "mlflow.note.content": _note(entry),
    }
    if paper:
        tags |= {"year": str(paper.year), "venue": paper.venue or "", "keywords": ", ".join(paper.keywords)}
    return tags | {f"claim/{judged.claim.id}": judged.outcome for judged in entry.claims}


def _note(entry: Entry) -> str:
    """A run's description: the claims as a list."""
    lines = [f"**{_markdown(entry.title)}**", ""]
    lines += [
        f"- {SYMBOLS[judged.outcome]} **{judged.claim.id} {judged.outcome}**: {_markdown(judged.claim.statement)}"
        for judged in entry.claims
    ]
    return "\n".join(lines)


def _digest(entry: Entry) -> str:
    """A digest of all that `track` records of a paper."""
    content = [_tags(entry), entry.counts]
    if entry.best:
        content += [entry.best.wall_time_seconds, entry.best.created, [figure.name for figure in entry.best.figures]]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
