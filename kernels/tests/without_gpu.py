"""Checks of Triton kernels on any machine: in Triton's interpreter, and through its compiler for an NVIDIA H100.

The interpreter accepts what the compiler refuses (a type that changes in a loop, a product too small for the tensor
cores), so both are asked. Triton decides once a process whether it interprets, hence processes of their own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def run_in_its_own_process(file: Path, *, interpret: bool, cache: Path) -> None:
    """Run the tests of a file in a new process; its output is what a failure shows."""
    pytest.importorskip("triton", reason="no Triton on this platform")
    environment = os.environ | {
        "TRITON_INTERPRET": str(int(interpret)),
        "TRITON_CACHE_DIR": str(cache),
        # Without a GPU in sight the checks are the same on every machine.
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [sys.executable, "-m", "pytest", str(file), "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command += ["--show-capture=no"]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert run.returncode == 0, run.stdout + run.stderr


def compile_instead_of_launching(
    monkeypatch: pytest.MonkeyPatch, module: ModuleType, names: Collection[str]
) -> dict[str, Any]:
    """From now on launches of these kernels of `module` compile them for an H100, with the arguments they would get.

    Returns the compiled kernels by name, which fills up as they are launched. Of the configurations to choose among
    only the last one is compiled.
    """
    import triton
    from triton.backends.compiler import GPUTarget

    driver = SimpleNamespace(
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
    )
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)
    compiled: dict[str, Any] = {}

    class Compile:
        def __init__(self, name: str, kernel: Any) -> None:
            self.name, self.kernel = name, kernel

        def __getitem__(self, grid: object) -> Any:
            if hasattr(self.kernel, "configs"):
                monkeypatch.setattr(self.kernel, "configs", self.kernel.configs[-1:])

            def launch(*args: Any, **options: Any) -> None:
                result = self.kernel.warmup(*args, grid=grid, **options)
                compiled[self.name] = result[0] if isinstance(result, list | tuple) else result

            return launch

    for name in names:
        monkeypatch.setattr(module, name, Compile(name, getattr(module, name)))
    return compiled
