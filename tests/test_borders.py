"""Imports run one way (papers → shared → kernels, pipelines → shared), and `shared.nn` stays light."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOMS = ("papers", "shared", "kernels", "pipelines")
ALLOWED = {
    "papers": {"shared", "kernels"},
    "shared": {"shared", "kernels"},
    "kernels": {"kernels"},
    "pipelines": {"pipelines", "shared"},
}
KERNELS_MAY_IMPORT = {"torch", "triton", "kernels", "__future__", *sys.stdlib_module_names}
HEAVY = ("mlflow", "dvc", "datasets", "matplotlib", "pandas")


def imported_names(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.module


def violations(root: Path) -> list[str]:
    found = []
    for room in ROOMS:
        for path in sorted((root / room).rglob("*.py")):
            inside_tests = "tests" in path.parts
            for name in imported_names(path):
                top = name.split(".")[0]
                where = f"{path.relative_to(root)} imports {name}"
                if top in ROOMS and top not in ALLOWED[room] and not (room == "papers" and inside_tests):
                    found.append(where)
                elif top == "papers":
                    found.append(f"{where}: papers are loaded by name, and reach themselves by relative imports")
                elif (
                    room == "kernels" and not inside_tests and path.name != "bench.py" and top not in KERNELS_MAY_IMPORT
                ):
                    found.append(f"{where}: kernels import torch and triton only")
    return found


def test_imports_run_one_way(root: Path) -> None:
    assert violations(root) == []


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("shared/nn.py", "import pipelines.cli"),
        ("papers/a/model.py", "from papers.b import model"),
        ("papers/a/model.py", "from pipelines import claims"),
        ("kernels/scan/cpu.py", "import numpy"),
        ("pipelines/cli.py", "from papers.a import train"),
    ],
)
def test_a_wrong_import_is_found(tmp_path: Path, path: str, line: str) -> None:
    file = tmp_path / path
    file.parent.mkdir(parents=True)
    file.write_text(line)
    assert len(violations(tmp_path)) == 1


@pytest.mark.parametrize("module", ["shared.nn", "shared.training", "shared.evaluation.metrics"])
def test_models_and_training_need_no_tracking_or_plotting(module: str) -> None:
    program = f"import sys, {module}; print([name for name in {HEAVY!r} if name in sys.modules])"
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"
