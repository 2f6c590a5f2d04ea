"""Compiles every Triton kernel for an NVIDIA H100, on any machine: `TRITON_INTERPRET=0 pytest compiled.py`.

The interpreter accepts what the compiler refuses, and what it refuses shows here. Run by `test_gpu.py` in a process of
its own, as the driver is replaced.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget

from kernels.normalization import gpu

_KERNELS = {name: kernel for name, kernel in vars(gpu).items() if name.endswith("_kernel")}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_kernels_compile_for_a_gpu(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each launch of a forward and a backward pass compiles its kernel instead, with the arguments it would get."""
    driver = SimpleNamespace(
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
    )
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)
    compiled = {}

    class Compile:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid: object) -> Any:
            warmup = _KERNELS[self.name].warmup
            return lambda *args, **options: compiled.update({self.name: warmup(*args, grid=grid, **options)})

    for name in _KERNELS:
        monkeypatch.setattr(gpu, name, Compile(name))
    x, gate, weight = (torch.zeros(*shape, dtype=dtype, requires_grad=True) for shape in ((3, 60), (3, 60), (60,)))
    gpu.rms_norm_gated_gpu(x, gate, weight, 1e-5).sum().backward()

    assert set(compiled) == set(_KERNELS)
    assert all("cubin" in kernel.asm for kernel in compiled.values())
