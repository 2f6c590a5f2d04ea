"""A throw-away repository that holds copies of paper folders, for tests that run real pipelines at tiny size."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

NOT_COPIED = shutil.ignore_patterns("data", "runs", "results", "dvc.lock", "__pycache__")
BIN = Path(sys.executable).parent


class Repository:
    """A repository in a temporary folder: `papers/` with copies, its own git and DVC, the installed `reprise`."""

    def __init__(self, source: Path, folder: Path) -> None:
        self.source, self.folder = source, folder
        (folder / "papers").mkdir(parents=True)
        for name in ("pyproject.toml", ".gitignore", "papers/__init__.py", "constraints.txt"):
            shutil.copy(source / name, folder / name)
        (folder / "README.md").write_text("# Test\n\n<!-- board:begin -->\n<!-- board:end -->\n")
        (folder / "dvc.yaml").write_text("stages: {}\n")
        self.run("git", "init", "--quiet")
        self.run("dvc", "init", "--quiet")
        self.run("dvc", "config", "core.analytics", "false")

    def add(self, slug: str, name: str | None = None, profile: str = "tiny") -> Path:
        """Copy a paper's folder (as `cp -r` would, without outputs), choose its profile and add its root stage."""
        name = name or slug
        folder = self.folder / "papers" / name
        shutil.copytree(self.source / "papers" / slug, folder, ignore=NOT_COPIED)
        set_profile(folder, profile)
        stages = yaml.safe_load((self.folder / "dvc.yaml").read_text())
        stages["stages"][f"papers/{name}"] = {
            "wdir": f"papers/{name}",
            "vars": ["params.yaml"],
            "cmd": "reprise verdict",
            "deps": ["paper.yaml", "results/${profile}/scores.csv"],
            "outs": [{"results/${profile}/verdict.json": {"cache": False}}],
        }
        (self.folder / "dvc.yaml").write_text(yaml.safe_dump(stages))
        return folder

    def environment(self, **more: str) -> dict[str, str]:
        """The environment of a user with the project's environment active."""
        path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
        return os.environ | {"PATH": path, "OMP_NUM_THREADS": "1", "REPRISE_TRACKING": "off", "NO_COLOR": "1"} | more

    def run(
        self, *command: str, cwd: Path | None = None, check: bool = True, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in the repository and return what it said; a failure shows its output."""
        result = subprocess.run(
            command,
            cwd=cwd or self.folder,
            env=self.environment(**environment),
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
        )
        if check and result.returncode:
            raise AssertionError(f"{' '.join(command)} failed:\n{result.stdout[-4000:]}\n{result.stderr[-4000:]}")
        return result

    def start(self, *command: str, cwd: Path | None = None, **environment: str) -> subprocess.Popen[str]:
        """Start a command in a process group of its own."""
        return subprocess.Popen(
            command,
            cwd=cwd or self.folder,
            env=self.environment(**environment),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )

    def run_pipeline(self, folder: Path, stages: Sequence[str] | None = None) -> None:
        """Run stages (by default all of a folder's dvc.yaml) in order, in one process, which spares each its start-up.

        A stage is given as `name` or `name@model`.
        """
        program = (
            "import sys; from pathlib import Path; from pipelines.runner import run_stage\n"
            "for stage in sys.argv[1:]:\n"
            "    name, _, model = stage.partition('@'); run_stage(Path.cwd(), name, model or None)\n"
        )
        self.run(sys.executable, "-c", program, *(stages or stage_calls(folder)), cwd=folder)


def stage_calls(folder: Path) -> list[str]:
    """The stages of a folder as `name` or `name@model`, read from the commands of its dvc.yaml."""
    calls = []
    for body in yaml.safe_load((folder / "dvc.yaml").read_text())["stages"].values():
        commands = (
            [body["cmd"]] if "cmd" in body else [body["do"]["cmd"].replace("${item}", item) for item in body["foreach"]]
        )
        for command in commands:
            words = shlex.split(command)
            assert words[:2] == ["reprise", "run"], f"a stage must be run by 'reprise run', not by {command!r}"
            calls.append(f"{words[2]}@{words[4]}" if len(words) > 3 else words[2])
    return calls


def set_profile(folder: Path, profile: str) -> None:
    """Choose a profile in a folder's params.yaml, comments and all the rest kept."""
    path = folder / "params.yaml"
    path.write_text(re.sub(r"(?m)^profile: \w+", f"profile: {profile}", path.read_text(encoding="utf-8")))


def edit_yaml(path: Path, edit: Callable[[Any], None]) -> None:
    """Change a YAML file through a function that changes its content in place; comments and anchors are lost."""
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    edit(content)
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")


def keep_models(folder: Path, *models: str) -> None:
    """Leave these models only, in the profile `tiny` and in the pipeline, and one claim that holds of every model."""

    def in_params(content: Any) -> None:
        for experiment in content["tiny"]["experiments"].values():
            experiment["models"] = list(models)

    def in_pipeline(content: Any) -> None:
        stages = content["stages"]
        stages["train"]["foreach"] = list(models)
        others = [dep for dep in stages["evaluate"]["deps"] if not dep.startswith("runs/")]
        stages["evaluate"]["deps"] = others + [f"runs/{model}" for model in models]

    def in_ledger(content: Any) -> None:
        check = {"kind": "threshold", "metric": "nrmse", "model": list(models), "datasets": ["advection/seen"]}
        content["claims"] = [
            {
                "id": "C1",
                "headline": True,
                "statement": "Errors are not negative",
                "place": "nowhere",
                "figures": "none",
                "mark": "not obtained",
                "check": check | {"at_least": 0},
            }
        ]

    edit_yaml(folder / "params.yaml", in_params)
    edit_yaml(folder / "dvc.yaml", in_pipeline)
    edit_yaml(folder / "paper.yaml", in_ledger)
