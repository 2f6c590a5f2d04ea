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

from kernels.linear_attention import gpu, gpu_kernels
from kernels.linear_attention.tests.interpreted import Gate, inputs

_KERNELS = {name: kernel for name, kernel in vars(gpu_kernels).items() if name.endswith("_kernel")}


@pytest.mark.parametrize(("gate", "with_bounds"), [("scalar", True), ("vector", False)])
def test_kernels_compile_for_a_gpu(
    gate: Gate, with_bounds: bool, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Each launch of a forward and a backward pass compiles its kernel instead, with the arguments it would get."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
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
    q, k, v, g, state = (x.float() for x in inputs(gate, 40, 16, 16))
    q, k, v = (x.bfloat16().requires_grad_() for x in (q, k, v))
    bounds = torch.tensor([0, 40]) if with_bounds else None
    o, final_state = gpu.gla_gpu(q, k, v, g, 1.0, state, True, bounds, chunk_size=16)
    (o.sum() + final_state.sum()).backward()

    only_vector = {"scores_kernel", "score_gradients_kernel", "intra_gradients_kernel"}
    assert set(compiled) == (set(_KERNELS) if gate == "vector" else set(_KERNELS) - only_vector)
    assert all("cubin" in kernel.asm for (kernel,) in compiled.values())
