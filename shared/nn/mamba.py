"""Mamba: a selective state-space layer."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from kernels.selective_scan import selective_scan
from shared.config import UserError
from shared.nn.linear_attention import ShortConvolution, expanded

# Channels begin with step sizes Δ in this range, uniform in their logarithm: Gu and Dao (2023), section 3.6.
FIRST_STEPS = (0.001, 0.1)


class Mamba(nn.Module):
    """The layer of Mamba (version 1), `[B, T, hidden_size]` to the same shape; a token mixer as in `attention`.

        u, z = x W_u, x W_z       u = SiLU(conv(u))       E = expand · hidden_size channels
        Δ = softplus(u W_Δ W_r + b),  B, C = u W_B, u W_C        B and C of `state_size` N
        h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t u_t            h `[B, E, N]`, A < 0
        y = ((C h + D u) ⊙ SiLU(z)) W_o

    `time_step_rank` is the rank of Δ's projection, by default ⌈hidden_size/16⌉. A begins as -(1 … N) in every channel,
    D as 1, and b such that Δ begins log-uniform between 0.001 and 0.1 (`reset_parameters`). In its own architecture
    this layer stands alone in a block: `LanguageModel(…, feed_forward_size=0)`, with twice as many layers.

    Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces" (2023), section 3 and algorithm 2.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        state_size: int = 16,
        expand: float = 2,
        convolution_size: int = 4,
        time_step_rank: int | None = None,
    ) -> None:
        super().__init__()
        if state_size < 1:
            raise UserError(f"Mamba needs a state_size of at least 1 (given: {state_size})")
        rank = math.ceil(hidden_size / 16) if time_step_rank is None else time_step_rank
        if rank < 1:
            raise UserError(f"Mamba needs a time_step_rank of at least 1 (given: {rank})")
        size = expanded(hidden_size, expand)
        self.splits = (rank, state_size, state_size)
        self.input = nn.Linear(hidden_size, 2 * size, bias=False)
        self.convolution = ShortConvolution(size, convolution_size, "silu", bias=True)
        self.selection = nn.Linear(size, sum(self.splits), bias=False)
        self.time_step = nn.Linear(rank, size)
        self.log_decay_rate = nn.Parameter(torch.empty(size, state_size))
        self.skip = nn.Parameter(torch.empty(size))
        self.output = nn.Linear(size, hidden_size, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """What this layer sets otherwise than its parts do: A, D, and the projection and bias of the time step."""
        nn.init.ones_(self.skip)
        with torch.no_grad():
            rates = torch.arange(1, self.log_decay_rate.shape[1] + 1, device=self.log_decay_rate.device)
            self.log_decay_rate.copy_(rates.log().expand_as(self.log_decay_rate))
            nn.init.uniform_(self.time_step.weight, -(self.splits[0] ** -0.5), self.splits[0] ** -0.5)
            step = nn.init.uniform_(self.time_step.bias, *(math.log(step) for step in FIRST_STEPS)).exp()
            # The inverse of softplus.
            self.time_step.bias.copy_(step + torch.log(-torch.expm1(-step)))

    def forward(
        self, x: Tensor, state: dict[str, Any] | None = None, keep_state: bool = False
    ) -> tuple[Tensor, dict[str, Any] | None]:
        history, memory = (None, None) if state is None else (state["convolution"], state["memory"])
        u, z = self.input(x).chunk(2, dim=-1)  # [B, T, E] each
        u, history = self.convolution(u, history, keep_state)
        low_rank, B, C = self.selection(u).split(self.splits, dim=-1)
        logits = self.time_step(low_rank)
        # In float32: the exponent Δ A of a slow channel is far below the resolution of half precision at 1.
        delta = functional.softplus(logits.to(torch.promote_types(logits.dtype, torch.float32)))
        A = -torch.exp(self.log_decay_rate)
        y, memory = selective_scan(u, delta, A, B, C, self.skip, initial_state=memory, output_final_state=keep_state)
        y = self.output(y * functional.silu(z))
        return y, {"memory": memory, "convolution": history} if keep_state else None
