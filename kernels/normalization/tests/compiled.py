"""Compiles every Triton kernel for an NVIDIA H100, on any machine; run by `test_gpu.py` in a process of its own."""

from __future__ import annotations

import pytest
import torch

from kernels.normalization import gpu
from kernels.tests.without_gpu import compile_instead_of_launching

KERNELS = {name for name in vars(gpu) if name.endswith("_kernel")}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_kernels_compile_for_a_gpu(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = compile_instead_of_launching(monkeypatch, gpu, KERNELS)
    x, gate, weight = (torch.zeros(*shape, dtype=dtype, requires_grad=True) for shape in ((3, 60), (3, 60), (60,)))
    gpu.rms_norm_gated_gpu(x, gate, weight, 1e-5).sum().backward()
    assert set(compiled) == KERNELS
    assert all("cubin" in kernel.asm for kernel in compiled.values())
