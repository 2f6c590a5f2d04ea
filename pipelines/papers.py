"""The papers of the repository, and the schema of a paper's ledger, `paper.yaml`.

A claim's check is declarative: it names models, data sets and a metric of scores.csv and what must hold between them.
How checks are decided is in `pipelines.claims`.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from shared.config import Strict, UserError, read_yaml, repo_root, validate

Text = Annotated[str, Field(min_length=1)]
# A name or a list of names.
Names = Annotated[tuple[Text, ...], BeforeValidator(lambda value: (value,) if isinstance(value, str) else value)]
Entries = Annotated[
    tuple[float | str, ...], BeforeValidator(lambda value: value if isinstance(value, list | tuple) else (value,))
]


class _Check(Strict):
    """What all checks share.

    `where` keeps the rows that have these entries in further columns of scores.csv. `require` says how many of the
    comparisons (one a data set and model or pair of models) must hold. `deterministic` is for numbers without spread,
    such as parameter counts, which are compared as they are. `seedless` names models that have no seed, such as
    persistence: their one value is held against every seed of the others.
    """

    metric: Text
    datasets: Annotated[Names, Field(min_length=1)]
    where: dict[str, Entries] = Field(default_factory=dict)
    require: Literal["all", "any", "majority"] = "all"
    deterministic: bool = False
    seedless: Names = ()


class _Range(Strict):
    """A range that is closed: `at_least`, `at_most`, or both."""

    at_least: float | None = None
    at_most: float | None = None

    @model_validator(mode="after")
    def _is_a_range(self) -> _Range:
        if self.at_least is None and self.at_most is None:
            raise ValueError("give at_least, at_most or both")
        if self.at_least is not None and self.at_most is not None and self.at_least > self.at_most:
            raise ValueError(f"at_least ({self.at_least}) is above at_most ({self.at_most}): nothing lies between")
        return self


class Pair(Strict):
    """Two models, of which the first is claimed to be the better."""

    model: Text
    over: Text


class Beats(_Check):
    """One model is better than another, by more than `margin` times the other's value.

    Give `pairs`, or `model` and `over` (a name or a list: each of the first against each of the second).
    """

    kind: Literal["beats"]
    better: Literal["higher", "lower"]
    pairs: tuple[Pair, ...] = ()
    model: Names = ()
    over: Names = ()
    margin: Annotated[float, Field(ge=0)] = 0.0

    @model_validator(mode="after")
    def _has_pairs(self) -> Beats:
        if bool(self.model) != bool(self.over) or bool(self.pairs) == bool(self.model):
            raise ValueError("give either 'pairs: [{model, over}]' or both 'model' and 'over'")
        if any(model == over for model, over in self.all_pairs()):
            raise ValueError("a model cannot beat itself")
        return self

    def all_pairs(self) -> list[tuple[str, str]]:
        """(model, over) of every comparison."""
        if self.pairs:
            return [(pair.model, pair.over) for pair in self.pairs]
        return [(model, over) for model in self.model for over in self.over]


class Ratio(_Check, _Range):
    """The ratio of two models' means lies in a range."""

    kind: Literal["ratio"]
    numerator: Text
    denominator: Text


class Equals(_Check):
    """A model's mean is `value`, give or take `tolerance`, or `relative_tolerance` times the value."""

    kind: Literal["equals"]
    model: Annotated[Names, Field(min_length=1)]
    value: float
    tolerance: Annotated[float, Field(ge=0)] | None = None
    relative_tolerance: Annotated[float, Field(ge=0)] | None = None

    @model_validator(mode="after")
    def _has_one_tolerance(self) -> Equals:
        if (self.tolerance is None) == (self.relative_tolerance is None):
            raise ValueError("give either 'tolerance' or 'relative_tolerance'")
        return self


class Trend(_Check):
    """A model's metric rises or falls along a numeric further column of scores.csv, such as `length`.

    Each seed (and item) gives a Spearman correlation or a least-squares slope, whose mean is held against zero.
    """

    kind: Literal["trend"]
    model: Annotated[Names, Field(min_length=1)]
    along: Text
    direction: Literal["increasing", "decreasing"]
    statistic: Literal["spearman", "slope"] = "spearman"


class Threshold(_Check, _Range):
    """A model's mean lies in a range."""

    kind: Literal["threshold"]
    model: Annotated[Names, Field(min_length=1)]


Check = Beats | Ratio | Equals | Trend | Threshold


class Gate(_Range):
    """What a model must reach before a claim is worth testing: a metric in a range, on average or in `every_seed`."""

    metric: Text
    model: Text
    dataset: Text
    every_seed: bool = False


class Reference(Strict):
    """A number of the paper that figures show beside ours; `recalled` if from memory, not read in a source."""

    label: Text
    value: float
    recalled: bool


class Claim(Strict):
    """A claim: what it says in our words, where, with which figures, and how scores are held against it.

    `mark` says whether the paper's `figures` were read in a source, recalled, or not obtained. Exactly one is given of
    `check`, `checks` (all of which must hold) and `untested` (the reason). With `profiles`, the claim is untested in
    all others; with `gate`, where the gate is not passed.
    """

    id: Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_.-]*$")]
    headline: bool = False
    statement: Text
    place: Text
    figures: Text
    mark: Literal["read", "recalled", "not obtained"]
    reference: tuple[Reference, ...] = ()
    check: Annotated[Check, Field(discriminator="kind")] | None = None
    checks: tuple[Annotated[Check, Field(discriminator="kind")], ...] = ()
    untested: Text | None = None
    profiles: Names = ()
    gate: Gate | None = None

    @model_validator(mode="after")
    def _is_checked_or_untested(self) -> Claim:
        if bool(self.check) + bool(self.checks) + bool(self.untested) != 1:
            raise ValueError("give exactly one of 'check', 'checks' and 'untested: <reason>'")
        return self

    def all_checks(self) -> tuple[Check, ...]:
        """The claim's checks, whether given as one or as several."""
        return (self.check,) if self.check else self.checks


class Code(Strict):
    """The authors' code and under which licence it is; `note` says what that means here."""

    url: str | None
    licence: str
    note: str | None = None


class DataFile(Strict):
    """A file of a data source; checksums and `size` (bytes) are null where the source does not publish them."""

    name: Text
    url: Text
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    md5: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")] | None = None
    size: Annotated[int, Field(ge=0)] | None = None


class DataSource(Strict):
    """Data that the paper used; `gate` says how to apply where it cannot simply be downloaded."""

    name: Text
    url: Text
    licence: Text
    gate: str | None = None
    files: tuple[DataFile, ...] = ()


class Paper(Strict):
    """The content of paper.yaml; `arxiv` and `venue` are null where there is none."""

    title: Text
    authors: Annotated[tuple[Text, ...], Field(min_length=1)]
    year: Annotated[int, Field(ge=1900, le=2100)]
    venue: str | None
    arxiv: Annotated[str, Field(pattern=r"^(\d{4}\.\d{4,5}|[a-z.-]+/\d{7})(v\d+)?$")] | None
    code: Code | None
    keywords: tuple[Text, ...]
    data: tuple[DataSource, ...]
    claims: Annotated[tuple[Claim, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _claims_are_in_order(self) -> Paper:
        twice = [name for name, count in Counter(claim.id for claim in self.claims).items() if count > 1]
        if twice:
            raise ValueError(f"claims need ids of their own; given twice: {', '.join(twice)}")
        headlines = [claim.headline for claim in self.claims]
        if headlines != sorted(headlines, reverse=True):
            raise ValueError("headline claims come first")
        return self


def find_papers(root: Path) -> list[Path]:
    """The folders of papers/ that hold a paper.yaml, by name; names that begin with `_` or `.` are passed over."""
    return sorted(path.parent for path in (root / "papers").glob("[!_.]*/paper.yaml"))


def load_paper(folder: Path) -> Paper:
    """Read and check a paper's ledger; `UserError` names file and key of a mistake."""
    path = folder / "paper.yaml"
    return validate(Paper, read_yaml(path), str(path))


def resolve_folder(argument: str | Path | None = None) -> Path:
    """The folder of a paper given as `cape`, `papers/cape` or a path; None is the working directory."""
    if argument is None:
        folder = Path.cwd()
        if (folder / "paper.yaml").is_file():
            return folder
        raise UserError(f"{folder} is not a paper's folder: name one of {_known(find_papers(repo_root()))}")
    root = repo_root()
    for candidate in (Path(argument), root / argument, root / "papers" / argument):
        if (candidate / "paper.yaml").is_file():
            return candidate.resolve()
    papers = find_papers(root)
    close = difflib.get_close_matches(Path(argument).name, [path.name for path in papers], n=1)
    hint = f" (did you mean {close[0]}?)" if close else ""
    raise UserError(f"there is no paper {str(argument)!r}{hint}; there are {_known(papers)}")


def _known(papers: Iterable[Path]) -> str:
    return ", ".join(path.name for path in papers) or "none yet (reprise new NAME makes one)"
