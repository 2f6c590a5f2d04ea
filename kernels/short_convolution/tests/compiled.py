"""Compiles every Triton kernel for an NVIDIA H100, on any machine; run by `test_gpu.py` in a process of its own."""

from __future__ import annotations

import pytest
import torch

from kernels.short_convolution import gpu
from kernels.tests.without_gpu import compile_instead_of_launching

KERNELS = {name for name in vars(gpu) if name.endswith("_kernel")}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_kernels_compile_for_a_gpu(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = compile_instead_of_launching(monkeypatch, gpu, KERNELS)
    shapes = ((1, 9, 60), (60, 4), (60,), (2, 60, 3))
    x, weight, bias, state = (torch.zeros(*shape, dtype=dtype, requires_grad=True) for shape in shapes)
    bounds = torch.tensor([0, 4, 9]) if dtype == torch.bfloat16 else None
    state = state if bounds is not None else state[:1]
    gpu.short_convolution_gpu(x, weight, bias, "silu", state, bounds).sum().backward()
    assert set(compiled) == KERNELS
    assert all("cubin" in kernel.asm for kernel in compiled.values())
