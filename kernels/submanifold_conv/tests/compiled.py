"""Compiles every Triton kernel for an NVIDIA H100, on any machine; run by `test_gpu.py` in a process of its own."""

from __future__ import annotations

import pytest
import torch

from kernels.submanifold_conv import build_rulebook, gpu
from kernels.submanifold_conv.tests.comparing import places
from kernels.tests.without_gpu import compile_instead_of_launching

KERNELS = {name for name in vars(gpu) if name.endswith("_kernel")}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_kernels_compile_for_a_gpu(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = compile_instead_of_launching(monkeypatch, gpu, KERNELS)
    rulebook = build_rulebook(places((4, 4, 4)), (4, 4, 4))
    shapes = ((rulebook.num_inputs, 20), (27, 20, 40), (40,))
    features, weight, bias = (torch.zeros(shape, dtype=dtype, requires_grad=True) for shape in shapes)
    gpu.sparse_conv_gpu(features, weight, bias, rulebook, False).sum().backward()
    assert set(compiled) == KERNELS
    assert all("cubin" in kernel.asm for kernel in compiled.values())
