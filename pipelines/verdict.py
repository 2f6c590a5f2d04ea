"""Holds a paper's scores against its claims: verdict.json, the results in the README, a table, and tags in MLflow."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipelines.claims import OUTCOMES, ClaimVerdict, Comparison, Outcome, judge_claim, range_text
from pipelines.papers import Beats, Paper, load_paper
from shared.config import Strict, UserError, chosen_profile, read_yaml, validate
from shared.evaluation.scores import overall, read_scores
from shared.evaluation.statistics import seed_summary
from shared.files import write_json, write_text

if TYPE_CHECKING:
    import pandas as pd
    from rich.console import Console

BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
SYMBOLS: dict[Outcome, str] = {"holds": "✔", "contradicted": "✘", "inconclusive": "~", "untested": "–"}
STYLES: dict[Outcome, str] = {"holds": "green", "contradicted": "red", "inconclusive": "yellow", "untested": "dim"}

# From the weakest evidence to the strongest, among profiles with the same kind of data.
PROFILES_BY_SIZE = ("small", "real", "long", "gpu", "paper")
REAL_DATA_PROFILES = ("real", "paper")
# The profile of the tests: never evidence, hence never shown.
TEST_PROFILE = "tiny"
# Comparisons shown of a claim; verdict.json has them all.
MAX_SHOWN = 6


class Verdict(Strict):
    """The verdicts on all claims of a paper in one profile."""

    paper: str
    profile: str
    claims: tuple[ClaimVerdict, ...]

    def counts(self) -> dict[Outcome, int]:
        """How many claims there are of each outcome."""
        return {outcome: sum(claim.verdict == outcome for claim in self.claims) for outcome in OUTCOMES}


def judge(folder: Path, profile: str | None = None) -> Verdict:
    """Hold the scores of a profile (default: the one that params.yaml chooses) against every claim.

    `UserError` lists every claim that names something the scores do not have.
    """
    paper = load_paper(folder)
    profile = _known_profile(folder, paper, profile)
    scores = _all_scores(folder, profile)
    claims, problems = [], []
    for claim in paper.claims:
        try:
            claims.append(judge_claim(claim, scores, profile))
        except UserError as error:
            problems.append(str(error))
    if problems:
        lines = "\n  ".join(problems)
        raise UserError(
            f"{folder / 'paper.yaml'} does not fit the scores of profile {profile}:\n  {lines}\n"
            "Mend the check, or say in which 'profiles' it is tested."
        )
    return Verdict(paper=folder.name, profile=profile, claims=tuple(claims))


def _all_scores(folder: Path, profile: str) -> pd.DataFrame:
    """The profile's scores.csv, and costs.csv if there is one.

    The latter has the same columns and holds what no two runs measure alike, such as times, so that scores.csv can be
    reproduced digit for digit.
    """
    import pandas as pd

    results = folder / "results" / profile
    tables = [read_scores(results / "scores.csv")]
    if (results / "costs.csv").is_file():
        tables.append(read_scores(results / "costs.csv"))
    return pd.concat(tables, ignore_index=True)


def write_verdict(folder: Path, profile: str | None = None) -> Verdict:
    """Judge a profile, write its verdict.json and the README's results, and tag the run that was evaluated."""
    verdict = judge(folder, profile)
    if verdict.profile == TEST_PROFILE:
        write_json(folder / "results" / verdict.profile / "verdict.json", verdict.model_dump(mode="json"))
        return verdict
    readme = folder / "README.md"
    text = _read_readme(readme)
    others = [load_verdict(folder, name) for name in profiles_by_strength(folder) if name != verdict.profile]
    updated = _with_block(text, results_block(folder, [verdict, *others]))
    write_json(folder / "results" / verdict.profile / "verdict.json", verdict.model_dump(mode="json"))
    if updated != text:
        write_text(readme, updated)
    _tag_run(folder, verdict)
    return verdict


def load_verdict(folder: Path, profile: str) -> Verdict:
    """Read a profile's verdict.json; `UserError` where it is missing or damaged."""
    return validate(Verdict, _read_json(path := folder / "results" / profile / "verdict.json"), str(path))


def load_metrics(folder: Path, profile: str) -> dict[str, Any]:
    """Read a profile's metrics.json; empty where the profile has none."""
    path = folder / "results" / profile / "metrics.json"
    return _read_json(path) if path.is_file() else {}


def profiles_by_strength(folder: Path) -> list[str]:
    """The profiles that have a verdict, the strongest evidence first."""
    profiles = [path.parent.name for path in (folder / "results").glob("*/verdict.json")]
    return _by_strength(folder, [profile for profile in profiles if profile != TEST_PROFILE])


def print_verdict(verdict: Verdict, console: Console | None = None) -> None:
    """Print the verdicts as a table, with the numbers they rest on."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=f"{verdict.paper}, profile {verdict.profile}", title_justify="left", show_lines=True)
    table.add_column("claim", no_wrap=True)
    table.add_column("says", ratio=2)
    table.add_column("here, with 95 % intervals", ratio=3)
    table.add_column("verdict", no_wrap=True)
    for claim in verdict.claims:
        outcome = Text(f"{SYMBOLS[claim.verdict]} {claim.verdict}", style=STYLES[claim.verdict])
        table.add_row(Text(claim.id), Text(claim.statement), Text("\n".join(_evidence(claim))), outcome)
    console = console or Console()
    console.print(table)
    console.print(", ".join(f"{count} {outcome}" for outcome, count in verdict.counts().items()), highlight=False)


def results_block(folder: Path, verdicts: Sequence[Verdict]) -> str:
    """The results of a README in Markdown: the strongest profile in full, the others folded up below it."""
    paper = load_paper(folder)
    by_profile = {verdict.profile: verdict for verdict in verdicts}
    first, *others = _by_strength(folder, list(by_profile))
    parts = [_heading(folder, first), _profile_results(folder, paper, by_profile[first])]
    for profile in others:
        results = _profile_results(folder, paper, by_profile[profile])
        parts.append(f"<details>\n<summary>{_heading(folder, profile, html=True)}</summary>\n\n{results}\n\n</details>")
    return "\n\n".join(parts)


# --- profiles ---


def _known_profile(folder: Path, paper: Paper, profile: str | None) -> str:
    """The profile to judge, after a look at whether it and those that claims name exist."""
    path = folder / "params.yaml"
    chosen = chosen_profile(path, profile)
    known = [name for name in read_yaml(path) if name != "profile"]
    for claim in paper.claims:
        for name in claim.profiles:
            if name not in known:
                raise UserError(
                    f"claim {claim.id} names profile {name!r}, which {path} does not have; it has {', '.join(known)}"
                )
    return chosen


def _by_strength(folder: Path, profiles: Sequence[str]) -> list[str]:
    """Real data before a stand-in, then larger before smaller."""

    def strength(profile: str) -> tuple[bool, int]:
        source = str(load_metrics(folder, profile).get("data_source", ""))
        is_real = profile in REAL_DATA_PROFILES or source.startswith("real")
        return is_real, PROFILES_BY_SIZE.index(profile) if profile in PROFILES_BY_SIZE else -1

    return sorted(sorted(profiles), key=strength, reverse=True)


def _heading(folder: Path, profile: str, *, html: bool = False) -> str:
    """One line on a profile: data, machine, time."""
    metrics = load_metrics(folder, profile)
    facts = [metrics.get("data_source"), metrics.get("device")]
    if metrics.get("wall_time_seconds") is not None:
        facts.append(_duration(metrics["wall_time_seconds"]))
    name = f"<b>Profile <code>{profile}</code></b>" if html else f"**Profile `{profile}`**"
    return " · ".join([name, *(str(fact) for fact in facts if fact)])


# --- Markdown ---


def _profile_results(folder: Path, paper: Paper, verdict: Verdict) -> str:
    scores = read_scores(folder / "results" / verdict.profile / "scores.csv")
    figures = sorted((folder / "results" / verdict.profile).glob("*.png"))
    parts = [_claims_table(paper, verdict)]
    parts += [_scores_table(scores, metric, better) for metric, better in _headline_metrics(paper, scores)]
    parts += [f"![{path.stem.replace('_', ' ')}]({path.relative_to(folder).as_posix()})" for path in figures]
    return "\n\n".join(parts)


def _claims_table(paper: Paper, verdict: Verdict) -> str:
    judged = {claim.id: claim for claim in verdict.claims}
    rows = []
    for claim in paper.claims:
        # A verdict of another profile may be older than the ledger.
        result = judged.get(claim.id)
        outcome = f"{SYMBOLS[result.verdict]} {result.verdict}" if result else "not judged yet"
        evidence = "<br>".join(map(_cell, _evidence(result))) if result else ""
        source = "" if claim.mark == "not obtained" else f"{claim.mark}; "
        figures = f"{_cell(claim.figures)} ({source}{_cell(claim.place)})"
        rows.append([claim.id, _cell(claim.statement), figures, evidence, f"**{outcome}**"])
    note = "In brackets: 95 % bootstrap intervals over seeds and test items. Improvements count + where better."
    return _table(["", "claim", "paper", "here", "verdict"], rows) + f"\n\n{note}"


def _scores_table(scores: pd.DataFrame, metric: str, better: str | None) -> str:
    """Mean ± standard deviation over seeds, models by data sets; the best mean of a data set is bold."""
    rows = overall(scores[scores["metric"] == metric])
    by_seed = rows.groupby(["model", "dataset", "seed"])["value"].agg(lambda values: values.mean(skipna=False))
    groups = {key: values.to_numpy() for key, values in by_seed.groupby(level=["model", "dataset"])}
    models, datasets = sorted({key[0] for key in groups}), sorted({key[1] for key in groups})
    best = {}
    if better:
        pick = max if better == "higher" else min
        for dataset in datasets:
            means = {m: groups[m, dataset].mean() for m in models if (m, dataset) in groups}
            finite = {model: mean for model, mean in means.items() if np.isfinite(mean)}
            best[dataset] = pick(finite, key=finite.__getitem__, default=None)
    body = []
    for model in models:
        cells = [_mean_and_sd(groups[model, dataset]) if (model, dataset) in groups else "" for dataset in datasets]
        marked = [f"**{cell}**" if best.get(d) == model else cell for cell, d in zip(cells, datasets, strict=True)]
        body.append([f"`{_cell(model)}`", *marked])
    direction = f", {better} is better" if better else ""
    title = f"{_cell(metric)}{direction}; mean ± standard deviation over seeds"
    return f"{title}\n\n" + _table(["model", *map(_cell, datasets)], body)


def _headline_metrics(paper: Paper, scores: pd.DataFrame) -> Iterator[tuple[str, str | None]]:
    """The metrics that headline claims compare models by, and which direction is better."""
    checked = [claim for claim in paper.claims if claim.all_checks()]
    headline = [claim for claim in checked if claim.headline] or checked
    seen: dict[str, str | None] = {}
    for check in (check for claim in headline for check in claim.all_checks() if not check.deterministic):
        better = check.better if isinstance(check, Beats) else None
        seen[check.metric] = seen.get(check.metric) or better
    return ((metric, better) for metric, better in seen.items() if (scores["metric"] == metric).any())


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


# --- numbers in words ---


def _evidence(claim: ClaimVerdict) -> list[str]:
    """The numbers a verdict rests on, a line a comparison; the reason where there are none."""
    if not claim.comparisons:
        return [claim.reason]
    shown = claim.comparisons[:MAX_SHOWN]
    marks = [f"{SYMBOLS[comparison.verdict]} " if len(claim.comparisons) > 1 else "" for comparison in shown]
    lines = [f"{mark}{_numbers(comparison)}" for mark, comparison in zip(marks, shown, strict=True)]
    if len(claim.comparisons) > MAX_SHOWN:
        lines.append(f"… {claim.reason}")
    return lines


def _numbers(comparison: Comparison) -> str:
    """A comparison in one line: where, who with which mean, and the quantity with its interval."""
    means = " vs ".join(f"{model} {_number(mean)}" for model, mean in comparison.means.items())
    text = f"{comparison.metric}, {comparison.dataset}: {means}"
    if comparison.quantity is None:
        return f"{text}; {comparison.reason}"
    numbers = (comparison.estimate, comparison.low, comparison.high)
    value, low, high = map(_percent if comparison.quantity == "improvement" else _number, numbers)
    interval = f" [{low}, {high}]" if comparison.low != comparison.high else ""
    # The mean stands beside its model already.
    text += interval if comparison.quantity == "mean" else f"; {comparison.quantity} {value}{interval}"
    if comparison.kind in ("ratio", "equals", "threshold"):
        text += f", claimed {range_text(comparison.at_least, comparison.at_most)}"
    return text


def _percent(share: float) -> str:
    return f"{100 * share:+.0f} %" if abs(share) >= 0.1 else f"{100 * share:+.1f} %"


def _number(value: float | None) -> str:
    if value is None:
        return "not finite"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _mean_and_sd(values: np.ndarray) -> str:
    diverged = int((~np.isfinite(values)).sum())
    if diverged:
        return f"not finite in {diverged} of {len(values)} seeds"
    summary = seed_summary(values)
    return _number(summary.mean) + (f" ± {summary.sd:.2g}" if summary.count > 1 else "")


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


# --- files and tracking ---


def _read_readme(path: Path) -> str:
    advice = f"it needs the lines {BEGIN} and {END}, once each and in this order, where the results go"
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path} is missing; {advice}") from None
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise UserError(f"{path} has no place for results: {advice}")
    return text


def _with_block(text: str, block: str) -> str:
    before, after = text[: text.index(BEGIN)], text[text.index(END) :]
    return f"{before}{BEGIN}\n\n{block}\n\n{after}"


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing: run the paper in this profile first (dvc repro)") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is cut off or damaged ({error}): run the paper in this profile again") from None


def _tag_run(folder: Path, verdict: Verdict) -> None:
    """Tag the tracked run that made the scores with what they say."""
    record = folder / "runs" / "timing" / verdict.profile / "evaluate.json"
    if record.is_file() and (run_id := _read_json(record).get("run_id")):
        from shared.tracking import deliver, open_run

        tags = {f"claim/{claim.id}": claim.verdict for claim in verdict.claims}
        tags |= {f"verdict/{outcome}": str(count) for outcome, count in verdict.counts().items()}
        with deliver(), open_run(run_id) as run:
            run.set_tags(tags)
