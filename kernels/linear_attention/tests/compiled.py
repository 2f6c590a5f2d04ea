"""Compiles every Triton kernel for an NVIDIA H100, on any machine; run by `test_gpu.py` in a process of its own."""

from __future__ import annotations

import pytest
import torch

from kernels.linear_attention import gpu, gpu_kernels
from kernels.linear_attention.tests.interpreted import Gate, inputs
from kernels.tests.without_gpu import compile_instead_of_launching

KERNELS = {name for name in vars(gpu_kernels) if name.endswith("_kernel")}
ONLY_VECTOR = {"scores_kernel", "score_gradients_kernel", "intra_gradients_kernel"}


@pytest.mark.parametrize(("gate", "with_bounds"), [("scalar", True), ("vector", False)])
def test_kernels_compile_for_a_gpu(gate: Gate, with_bounds: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = compile_instead_of_launching(monkeypatch, gpu_kernels, KERNELS)
    q, k, v, g, state = (x.float() for x in inputs(gate, 40, 16, 16))
    q, k, v = (x.bfloat16().requires_grad_() for x in (q, k, v))
    bounds = torch.tensor([0, 40]) if with_bounds else None
    o, final_state = gpu.gla_gpu(q, k, v, g, 1.0, state, True, bounds, chunk_size=16)
    (o.sum() + final_state.sum()).backward()
    assert set(compiled) == (KERNELS if gate == "vector" else KERNELS - ONLY_VECTOR)
    assert all("cubin" in kernel.asm for kernel in compiled.values())
