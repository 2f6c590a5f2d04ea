"""Typed parameters of a paper, and the stage that a command runs in."""

from __future__ import annotations

import contextlib
import importlib
import os
import reprlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

try:
    # libyaml's parser, where PyYAML was built with it: seven times as fast, and just as safe.
    from yaml import CSafeLoader as SafeLoader
except ImportError:
    from yaml import SafeLoader

if TYPE_CHECKING:
    from shared.tracking import Run


class UserError(Exception):
    """A mistake that its message lets the user mend: what was given, what is allowed, what to do next."""


class Strict(BaseModel):
    """A pydantic model that refuses unknown keys and changes after construction."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


ParamsType = TypeVar("ParamsType", bound=Strict)


@dataclass(frozen=True)
class Stage(Generic[ParamsType]):
    """What a stage of a paper's pipeline is told by the runner.

    `folder` is the paper's folder and `slug` its name; `model` is the option `--model` where a stage runs once a model;
    `run` is the tracked run of the stage, parent of those of its seeds.
    """

    folder: Path
    name: str
    profile: str
    params: ParamsType
    model: str | None = None
    run: Run | None = None

    @property
    def slug(self) -> str:
        return self.folder.name

    @property
    def data_dir(self) -> Path:
        """Prepared data, a DVC output."""
        return self.folder / "data"

    @property
    def runs_dir(self) -> Path:
        """Checkpoints and predictions, one folder a model, DVC outputs."""
        return self.folder / "runs"

    @property
    def results_dir(self) -> Path:
        """Scores, verdict and figures of this profile, small and kept in git."""
        return self.folder / "results" / self.profile


def load_optional(module: str, extra: str) -> Any:
    """A module of an optional package; `UserError` names the extra of pyproject.toml that brings what is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = (error.name or module).split(".")[0]
        raise UserError(f"this needs the package {package}: install it by pip install -e '.[{extra}]'") from None


def repo_root(start: Path | None = None) -> Path:
    """The root of the repository: the nearest folder upward that holds both `pyproject.toml` and `papers/`.

    Looks upward from `start` (default: the working directory), then from this file, so that commands given outside
    of a checkout still find the one they were installed from.
    """
    for origin in (start or Path.cwd(), Path(__file__).parent):
        for folder in (origin.resolve(), *origin.resolve().parents):
            if (folder / "pyproject.toml").is_file() and (folder / "papers").is_dir():
                return folder
    raise UserError(
        f"no Reprise checkout found upward of {start or Path.cwd()}: run this inside the repository "
        "(the folder that holds pyproject.toml and papers/)"
    )


def data_root() -> Path:
    """Where real data is looked for: `$REPRISE_DATA`, by default `data/` in the repository."""
    value = os.environ.get("REPRISE_DATA")
    return Path(value).expanduser().resolve() if value else repo_root() / "data"


def read_yaml(path: Path) -> Any:
    """Safe-load a YAML file; `UserError` names file, line and column of a mistake."""
    try:
        text = path.read_text(encoding="utf-8")
        with contextlib.suppress(yaml.YAMLError):
            return yaml.load(text, Loader=SafeLoader)
        # Once more with the slow parser, whose message quotes the line that is wrong.
        return yaml.safe_load(text)
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {error}") from None


def load_params(path: Path, schema: type[ParamsType], profile: str | None = None) -> tuple[str, ParamsType]:
    """Read `params.yaml` and return the chosen profile's name and its validated section.

    The file is `profile: <name>` followed by one section a profile; every section is checked, so that a misspelt key
    in a profile that is not in use is found as well. `profile` overrides the file's choice.
    """
    chosen = chosen_profile(path, profile)
    sections = {name: section for name, section in read_yaml(path).items() if name != "profile"}
    loaded = {name: validate(schema, section, f"{path}, section {name!r}") for name, section in sections.items()}
    return chosen, loaded[chosen]


def chosen_profile(path: Path, profile: str | None = None) -> str:
    """The profile that `params.yaml` chooses, or `profile` if it is given; one that is not there is an error."""
    content = read_yaml(path)
    if not isinstance(content, dict) or "profile" not in content:
        raise UserError(f"{path} must be 'profile: <name>' followed by one section per profile")
    chosen, known = profile or content["profile"], [name for name in content if name != "profile"]
    if chosen not in known:
        raise UserError(f"{path}: there is no profile {chosen!r}; choose one of {', '.join(map(str, known))}")
    return chosen


def validate(schema: type[ParamsType], value: Any, where: str) -> ParamsType:
    """Check `value` against `schema`; on a mistake say where, which key, what was given and what is allowed."""
    try:
        return schema.model_validate(value)
    except ValidationError as error:
        lines = [f"{where} is not valid:"]
        for problem in error.errors(include_url=False):
            key = ".".join(map(str, problem["loc"])) or "(the whole section)"
            if problem["type"] == "extra_forbidden":
                known = _known_keys(schema, problem["loc"][:-1])
                lines.append(f"  {key}: unknown key; allowed here: {', '.join(known)}")
            else:
                given = "" if problem["type"] == "missing" else f" (given: {reprlib.repr(problem['input'])})"
                lines.append(f"  {key}: {problem['msg'].removeprefix('Value error, ')}{given}")
        raise UserError("\n".join(lines)) from None


def _known_keys(schema: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """The keys that `schema` allows at a location inside it, as far as the types name them."""
    candidates = [schema]
    for part in location:
        fields = [candidate.model_fields[part] for candidate in candidates if part in candidate.model_fields]
        if fields:
            candidates = list(_models_in(fields[0].annotation)) or candidates
        elif isinstance(part, str):
            # Pydantic names the member of a tagged union by its tag.
            tagged = [c for c in candidates if any(part in get_args(f.annotation) for f in c.model_fields.values())]
            candidates = tagged or candidates
    return sorted({name for candidate in candidates for name in candidate.model_fields})


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models_in(argument)
