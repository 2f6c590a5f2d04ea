"""Compiles every Triton kernel for an NVIDIA H100, on any machine; run by `test_gpu.py` in a process of its own."""

from __future__ import annotations

import pytest
import torch

from kernels.delta_rule import gpu, gpu_kernels
from kernels.delta_rule.tests.interpreted import inputs
from kernels.tests.without_gpu import compile_instead_of_launching

KERNELS = {name for name in vars(gpu_kernels) if name.endswith("_kernel")}
SHARED_MEMORY = 227 * 1024  # bytes that a program may have on Hopper


@pytest.mark.parametrize(("dtype", "head_dim", "bounds"), [(torch.bfloat16, 128, None), (torch.float16, 60, [0, 40])])
def test_kernels_compile_for_a_gpu(
    dtype: torch.dtype, head_dim: int, bounds: list[int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = compile_instead_of_launching(monkeypatch, gpu_kernels, KERNELS)
    leaves = [x.to(dtype).requires_grad_() for x in inputs(40, head_dim, head_dim)]
    cu_seqlens = None if bounds is None else torch.tensor(bounds)
    o, final_state = gpu.delta_rule_gpu(*leaves[:4], 1.0, leaves[4], True, cu_seqlens)
    (o.sum() + final_state.sum()).backward()
    assert set(compiled) == KERNELS
    for kernel in compiled.values():
        assert "cubin" in kernel.asm
        assert kernel.metadata.shared <= SHARED_MEMORY
