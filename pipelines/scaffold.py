"""Starts a new paper as a copy of one that is there."""

from __future__ import annotations

import difflib
import keyword
import os
import re
import shutil
import tempfile
from io import StringIO
from pathlib import Path
from typing import Any

from shared.config import UserError
from shared.files import write_text

# What running a paper leaves in its folder: the copy makes its own.
OUTPUTS = {"data", "runs", "results", "dvc.lock"}
RESULTS_BLOCK = re.compile(r"(<!-- results:begin -->).*?(<!-- results:end -->)", re.DOTALL)


def new_paper(root: Path, name: str, source: str = "cape") -> Path:
    """Copy `papers/<source>` to `papers/<name>` without its outputs, and add the copy's stage to the root dvc.yaml.

    The copy appears whole or not at all. `UserError` for a name that cannot be a package or is taken, for an unknown
    source, and for a root dvc.yaml that cannot be read.
    """
    papers = root / "papers"
    _check_name(papers, name)
    source_folder = _source_folder(papers, source)
    pipeline_file = root / "dvc.yaml"
    pipeline = with_stage(pipeline_file, name, source_folder.name)
    folder = papers / name
    with tempfile.TemporaryDirectory(prefix=".new-", dir=papers) as temporary:
        copy = Path(temporary) / name
        shutil.copytree(source_folder, copy, symlinks=True, ignore=_ignore_outputs(source_folder))
        _reset_results(copy / "README.md")
        os.rename(copy, folder)
    try:
        write_text(pipeline_file, pipeline)
    except BaseException:
        shutil.rmtree(folder)
        raise
    return folder


def root_stage(name: str) -> dict[str, Any]:
    """The stage of the root dvc.yaml that judges the claims of `papers/<name>` after the folder's own pipeline."""
    return {
        "wdir": f"papers/{name}",
        "vars": ["params.yaml"],
        "cmd": "reprise verdict",
        "deps": ["paper.yaml", "results/${profile}/scores.csv"],
        "outs": [{"results/${profile}/verdict.json": {"cache": False}}],
    }


def with_stage(pipeline_file: Path, name: str, source: str) -> str:
    """The text of the root dvc.yaml with the stage of `papers/<name>` added, comments and order kept.

    The stage goes after the last paper's. Where another stage (the scoreboard) depends on files of the source, it
    comes to depend on the same files of the copy.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    yaml = YAML()
    yaml.preserve_quotes = True
    yaml.width = 1000
    yaml.indent(mapping=2, sequence=4, offset=2)
    try:
        content = yaml.load(pipeline_file.read_text(encoding="utf-8"))
        stages = content["stages"]
        names = list(stages)
    except FileNotFoundError:
        raise UserError(f"{pipeline_file} is missing: run this in a Reprise checkout") from None
    except (YAMLError, TypeError, KeyError) as error:
        raise UserError(f"{pipeline_file} cannot be read as a DVC pipeline with 'stages': {error}") from None
    stage = f"papers/{name}"
    if stage in stages:
        raise UserError(f"{pipeline_file} already has a stage {stage!r}: take another name, or remove the stage first")
    for other in stages.values():
        deps = other.get("deps", []) if isinstance(other, dict) else []
        followed = [dep for dep in deps if isinstance(dep, str) and f"{dep}/".startswith(f"papers/{source}/")]
        deps.extend(dep.replace(f"papers/{source}", stage, 1) for dep in followed)
    last_paper = max((i for i, key in enumerate(names) if key.startswith("papers/")), default=-1)
    stages.insert(last_paper + 1, stage, root_stage(name))
    text = StringIO()
    yaml.dump(content, text)
    return text.getvalue()


def _check_name(papers: Path, name: str) -> None:
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name):
        raise UserError(
            f"{name!r} cannot be the name of a paper's folder, which is a Python package: use lowercase letters, "
            "digits and underscores, a letter first, and no Python keyword, such as 'my_paper'"
        )
    if (papers / name).exists():
        raise UserError(f"papers/{name} exists already: take another name, or remove that folder first")


def _source_folder(papers: Path, source: str) -> Path:
    source = source.strip("/").removeprefix("papers/")
    known = sorted(file.parent.name for file in papers.glob("[!._]*/paper.yaml"))
    if source not in known:
        close = difflib.get_close_matches(source, known, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise UserError(f"there is no paper {source!r} to copy{hint}; there are: {', '.join(known) or 'none'}")
    return papers / source


def _ignore_outputs(source_folder: Path) -> Any:
    def ignore(folder: str, names: list[str]) -> set[str]:
        outputs = OUTPUTS if Path(folder) == source_folder else set()
        return {name for name in names if name in outputs or name == "__pycache__" or name.endswith(".pyc")}

    return ignore


def _reset_results(readme: Path) -> None:
    if readme.is_file():
        text = readme.read_text(encoding="utf-8")
        readme.write_text(RESULTS_BLOCK.sub(r"\1\nNo results yet.\n\2", text), encoding="utf-8")
