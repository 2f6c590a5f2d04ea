"""Compiles every Triton kernel for an NVIDIA H100, on any machine: `TRITON_INTERPRET=0 pytest compiled.py`.

The interpreter accepts what the compiler refuses (a type that changes in a loop, a product too small for the tensor
cores), and what it refuses shows here. Run by `test_gpu.py` in a process of its own, as the driver is replaced.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget

from kernels.delta_rule import gpu, gpu_kernels
from kernels.delta_rule.tests.interpreted import inputs

_KERNELS = {name: kernel for name, kernel in vars(gpu_kernels).items() if name.endswith("_kernel")}
_SHARED_MEMORY = 227 * 1024  # bytes that a program may have on Hopper


@pytest.mark.parametrize(("dtype", "head_dim", "bounds"), [(torch.bfloat16, 128, None), (torch.float16, 60, [0, 40])])
def test_kernels_compile_for_a_gpu(
    dtype: torch.dtype, head_dim: int, bounds: list[int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
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
            kernel = _KERNELS[self.name]
            monkeypatch.setattr(kernel, "configs", kernel.configs[-1:])
            return lambda *args, **options: compiled.update({self.name: kernel.warmup(*args, grid=grid, **options)})

    for name in _KERNELS:
        monkeypatch.setattr(gpu_kernels, name, Compile(name))
    leaves = [x.to(dtype).requires_grad_() for x in inputs(40, head_dim, head_dim)]
    cu_seqlens = None if bounds is None else torch.tensor(bounds)
    o, final_state = gpu.delta_rule_gpu(*leaves[:4], 1.0, leaves[4], True, cu_seqlens)
    (o.sum() + final_state.sum()).backward()

    assert set(compiled) == set(_KERNELS)
    for (kernel,) in compiled.values():
        assert "cubin" in kernel.asm
        assert kernel.metadata.shared <= _SHARED_MEMORY
