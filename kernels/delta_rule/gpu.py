"""The delta rule on a GPU: the chunkwise algorithm in Triton, forward and backward.

Yang, Wang, Zhang, Shen and Kim, "Parallelizing Linear Transformers with the Delta Rule over Sequence Length" (NeurIPS
2024), section 3; the equations stand in `gpu_kernels.py`, one kernel each.

The two passes are registered with `torch.library.custom_op`, so that `torch.compile` and export see one operator with
known output shapes and need not trace the launches and their autotuning. For the backward pass q, k, v, β, T and the
initial state are kept; W, U, the states and the pseudo-values are computed again. Gradients are first derivatives:
the backward pass is not itself differentiable.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from kernels.delta_rule import gpu_kernels as kernels
from kernels.delta_rule.cpu import delta_rule_cpu

CHUNK_SIZES = (16, 32, 64)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_KEY_DIM = 256


def delta_rule_gpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    scale: float,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    *,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """S_t = (I - β_t k_t k_tᵀ) S_{t-1} + β_t k_t v_tᵀ,  o_t = scale S_tᵀ q_t, in chunks of tokens.

    q, k `[B, T, H, K]` with K ≤ 256; v `[B, T, H, V]`; β `[B, T, H]`; states `[B, H, K, V]` in fp32. With `cu_seqlens`
    `[sequences + 1]` the sequences lie end to end in a batch of one, and there is one state a sequence. Returns
    o `[B, T, H, V]` in the dtype of v, and the final state or None.

    `chunk_size` C is 16, 32 or 64; by default 64, and 32 for fp32 inputs, whose tiles are twice as large. Products of
    fp32 inputs have fp32's precision unless `torch.backends.cuda.matmul.fp32_precision` is "tf32". fp64 inputs, which
    tensor cores and registers are too small for, take the PyTorch path.

    ValueError: K above 256, or another chunk size. TypeError: q, k and v not of one dtype out of these four.
    """
    if q.dtype == torch.float64 and k.dtype == v.dtype == q.dtype:
        return delta_rule_cpu(
            q, k, v, beta, scale, initial_state, output_final_state, cu_seqlens, chunk_size=chunk_size
        )
    if q.dtype not in DTYPES or k.dtype != q.dtype or v.dtype != q.dtype:
        raise TypeError(
            "delta_rule on a GPU takes q, k and v of one dtype out of float16, bfloat16, float32 and float64 "
            f"(given: q {q.dtype}, k {k.dtype}, v {v.dtype}); convert with .to()"
        )
    if q.shape[-1] > MAX_KEY_DIM:
        raise ValueError(
            f"delta_rule on a GPU takes key dimensions up to {MAX_KEY_DIM}, since a program holds all rows of "
            f"the state (given: {q.shape[-1]}); use more heads with fewer dimensions each"
        )
    if chunk_size is None:
        chunk_size = 32 if q.dtype == torch.float32 else 64
    if chunk_size not in CHUNK_SIZES:
        raise ValueError(f"chunk_size must be one of {CHUNK_SIZES} (given: {chunk_size})")
    if initial_state is not None:
        initial_state = initial_state.float()
    o, final_state, _ = delta_rule_forward(
        q, k, v, beta, initial_state, cu_seqlens, scale, output_final_state, chunk_size
    )
    return o, final_state if output_final_state else None


class _Plan(NamedTuple):
    """How a problem is cut into chunks, and the arguments that the kernels have in common."""

    num_sequences: int
    num_chunks: int
    sizes: dict[str, Any]
    chunk_table: dict[str, Tensor | None]
    sequence_table: dict[str, Tensor | None]

    def tiles_of_values(self, num_blocks: int) -> Callable[[dict[str, int]], tuple[int, int]]:
        """The grid `(num_blocks · H, tiles of V)`."""
        return lambda meta: (num_blocks * self.sizes["H"], triton.cdiv(self.sizes["V"], meta["BLOCK_V"]))


def _plan(q: Tensor, v: Tensor, cu_seqlens: Tensor | None, chunk_size: int) -> _Plan:
    batch, length, num_heads, key_dim = q.shape
    # Three TF32 products are as good as one in fp32, and on the tensor cores.
    precision = "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"
    sizes = {"T": length, "H": num_heads, "K": key_dim, "V": v.shape[-1], "C": chunk_size, "PRECISION": precision}
    if cu_seqlens is None:
        no_chunks = {"chunk_start": None, "chunk_end": None}
        no_sequences = {"cu_seqlens": None, "chunk_offsets": None}
        return _Plan(batch, batch * triton.cdiv(length, chunk_size), sizes, no_chunks, no_sequences)
    cu_seqlens = cu_seqlens.to(q.device, torch.int64)
    num_sequences = len(cu_seqlens) - 1
    # Each sequence leaves at most one chunk unfilled. To number as many as there may be, the surplus ones being empty,
    # spares the host from waiting for the device to count them.
    num_chunks = length // chunk_size + num_sequences
    chunks = (cu_seqlens.diff() + chunk_size - 1) // chunk_size
    chunk_offsets = torch.nn.functional.pad(chunks.cumsum(0), (1, 0))
    chunk = torch.arange(num_chunks, device=q.device)
    sequence = torch.searchsorted(chunk_offsets[1:], chunk, right=True)
    chunk_start = cu_seqlens[sequence] + (chunk - chunk_offsets[sequence]) * chunk_size
    chunk_end = cu_seqlens[(sequence + 1).clamp(max=num_sequences)]
    return _Plan(
        num_sequences,
        num_chunks,
        sizes,
        {"chunk_start": chunk_start, "chunk_end": chunk_end},
        {"cu_seqlens": cu_seqlens, "chunk_offsets": chunk_offsets},
    )


def _on_device(tensor: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def _states(
    plan: _Plan,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    inverse: Tensor,
    initial_state: Tensor | None,
    final_state: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """W `[B, T, H, K]`, the pseudo-values `[B, T, H, V]` and the states that enter the chunks `[chunks, H, K, V]`."""
    num_heads, key_dim, value_dim = plan.sizes["H"], plan.sizes["K"], plan.sizes["V"]
    w, u, pseudo_values = torch.empty_like(k), torch.empty_like(v), torch.empty_like(v)
    states = k.new_empty(plan.num_chunks, num_heads, key_dim, value_dim)
    kernels.pseudo_key_value_kernel[(plan.num_chunks * num_heads,)](
        k, v, beta, inverse, w, u, **plan.chunk_table, **plan.sizes
    )
    kernels.state_kernel[plan.tiles_of_values(plan.num_sequences)](
        k,
        w,
        u,
        initial_state,
        states,
        pseudo_values,
        final_state,
        **plan.sequence_table,
        **plan.sizes,
        BLOCK_K=_whole(key_dim),
    )
    return w, pseudo_values, states


def _whole(key_dim: int) -> int:
    """Rows of a tile that holds a whole state, of 16 at least, as a matrix product on a GPU needs them."""
    return max(16, triton.next_power_of_2(key_dim))


@torch.library.custom_op("reprise::delta_rule", mutates_args=())
def delta_rule_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    output_final_state: bool,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """o `[B, T, H, V]`, the final state `[sequences, H, K, V]` (empty unless asked for) and T `[B, T, H, C]`."""
    q, k, v, beta = (x.contiguous() for x in (q, k, v, beta))
    initial_state = None if initial_state is None else initial_state.contiguous()
    plan = _plan(q, v, cu_seqlens, chunk_size)
    o, final_state, inverse = _outputs(q, k, v, beta, initial_state, cu_seqlens, scale, output_final_state, chunk_size)
    with _on_device(q):
        kernels.ut_transform_kernel[(plan.num_chunks * plan.sizes["H"],)](
            k, beta, inverse, **plan.chunk_table, **plan.sizes
        )
        _, pseudo_values, states = _states(
            plan, k, v, beta, inverse, initial_state, final_state if output_final_state else None
        )
        kernels.output_kernel[plan.tiles_of_values(plan.num_chunks)](
            q, k, pseudo_values, states, o, scale, **plan.chunk_table, **plan.sizes
        )
    return o, final_state, inverse


@delta_rule_forward.register_fake
def _outputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    output_final_state: bool,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, length, num_heads, key_dim = q.shape
    num_sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    state_shape = (num_sequences, num_heads, key_dim, v.shape[-1]) if output_final_state else (0,)
    o = v.new_empty(v.shape)
    inverse = q.new_empty((batch, length, num_heads, chunk_size))
    return o, q.new_empty(state_shape, dtype=torch.float32), inverse


@torch.library.custom_op("reprise::delta_rule_backward", mutates_args=())
def delta_rule_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    inverse: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    grad_o: Tensor,
    grad_final_state: Tensor | None,
    scale: float,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, β and of the initial state (empty where there was none)."""
    q, k, v, beta, grad_o = (x.contiguous() for x in (q, k, v, beta, grad_o))
    initial_state = None if initial_state is None else initial_state.contiguous()
    grad_final_state = None if grad_final_state is None else grad_final_state.contiguous()
    plan = _plan(q, v, cu_seqlens, chunk_size)
    batch, length, num_heads, key_dim = q.shape
    grad_q, grad_k, grad_v, _, grad_initial_state = _gradients(
        q, k, v, beta, inverse, initial_state, cu_seqlens, grad_o, grad_final_state, scale, chunk_size
    )
    block_k = min(_whole(key_dim), 32 if q.dtype == torch.float32 else 64)
    # Summed up below: one part from the values, and one from each tile of the keys.
    grad_beta = beta.new_empty((1 + triton.cdiv(key_dim, block_k), *beta.shape), dtype=torch.float32)
    grad_local, grad_values, grad_residual = torch.empty_like(v), torch.empty_like(v), torch.empty_like(v)
    with _on_device(q):
        w, pseudo_values, states = _states(plan, k, v, beta, inverse, initial_state, None)
        grad_states = torch.empty_like(states)
        kernels.local_gradient_kernel[plan.tiles_of_values(plan.num_chunks)](
            q, k, grad_o, grad_local, scale, **plan.chunk_table, **plan.sizes
        )
        kernels.state_gradient_kernel[plan.tiles_of_values(plan.num_sequences)](
            q,
            k,
            w,
            grad_o,
            grad_local,
            grad_final_state,
            grad_states,
            grad_values,
            None if initial_state is None else grad_initial_state,
            scale,
            **plan.sequence_table,
            **plan.sizes,
            BLOCK_K=_whole(key_dim),
        )
        kernels.value_gradient_kernel[(plan.num_chunks * num_heads,)](
            k, v, beta, inverse, grad_values, grad_residual, grad_v, grad_beta[0], **plan.chunk_table, **plan.sizes
        )
        kernels.query_key_gradient_kernel[(plan.num_chunks * num_heads, triton.cdiv(key_dim, block_k))](
            q,
            k,
            beta,
            pseudo_values,
            states,
            grad_o,
            grad_residual,
            grad_states,
            grad_q,
            grad_k,
            grad_beta[1:],
            scale,
            batch * length,
            **plan.chunk_table,
            **plan.sizes,
            BLOCK_K=block_k,
        )
        grad_beta = grad_beta.sum(0).to(beta.dtype)
    return grad_q, grad_k, grad_v, grad_beta, grad_initial_state


@delta_rule_backward.register_fake
def _gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    inverse: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    grad_o: Tensor,
    grad_final_state: Tensor | None,
    scale: float,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    grad_initial_state = q.new_empty((0,), dtype=torch.float32) if initial_state is None else initial_state
    return tuple(x.new_empty(x.shape) for x in (q, k, v, beta, grad_initial_state))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, beta, initial_state, cu_seqlens, ctx.scale, ctx.output_final_state, ctx.chunk_size = inputs
    ctx.save_for_backward(q, k, v, beta, output[2], initial_state, cu_seqlens)


def _differentiate(
    ctx: Any, grad_o: Tensor, grad_final_state: Tensor, _grad_inverse: Tensor
) -> tuple[Tensor | None, ...]:
    q, k, v, beta, inverse, initial_state, cu_seqlens = ctx.saved_tensors
    if not ctx.output_final_state:
        grad_final_state = None
    *gradients, grad_initial_state = delta_rule_backward(
        q, k, v, beta, inverse, initial_state, cu_seqlens, grad_o, grad_final_state, ctx.scale, ctx.chunk_size
    )
    return *gradients, None if initial_state is None else grad_initial_state, None, None, None, None


delta_rule_forward.register_autograd(_differentiate, setup_context=_setup_context)
