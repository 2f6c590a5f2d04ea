"""The parts of a decoder under one set of names, whoever wrote it: an adapter a family, and its weights by role.

An adapter keeps the model's own modules (norms, projections, rotary tables, experts) and only says which is which, so
that nothing is copied or converted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from shared.config import UserError
from shared.lm.model import HouseModel
from shared.nn.language_model import SwiGLU

Rotation = tuple[Tensor, Tensor] | None


@dataclass(frozen=True)
class Projection:
    """Queries, keys or values of all heads, possibly a part of what one fused module computes.

    `split` takes the heads and their channels out of the last axis of the module's output: `[…, out]` to `[…, H, K]`.
    """

    module: nn.Module
    split: Callable[[Tensor], Tensor]
    norm: nn.Module | None = None

    def of(self, computed: Tensor) -> Tensor:
        return self.split(computed if self.norm is None else self.norm(computed))


@dataclass
class Layer:
    """One pre-norm layer. `scale` multiplies q·k; `window` limits how far back a query sees.

    A feed-forward layer of one node (a mixture of experts) has no `pre`, `up`, `act` and `down`, but `expert_reads`:
    the weights by which router and experts read the normalized residual stream, `[d, …]` each.
    """

    attention_norm: nn.Module
    query: Projection
    key: Projection
    value: Projection
    output: nn.Module
    scale: float
    feed_forward_norm: nn.Module
    feed_forward: Callable[[Tensor], Tensor]
    pre: nn.Module | None = None
    up: nn.Module | None = None
    act: Callable[[Tensor], Tensor] | None = None
    down: nn.Module | None = None
    expert_reads: tuple[Tensor, ...] = ()
    window: int | None = None
    parallel: bool = False

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Normalized residual stream `[B, T, d]` to queries, keys, values `[B, T, heads, K]`, not yet turned."""
        projections = (self.query, self.key, self.value)
        computed = {module: module(x) for module in dict.fromkeys(p.module for p in projections)}
        q, k, v = (p.of(computed[p.module]) for p in projections)
        return q, k, v


@dataclass
class Decoder:
    """A whole model: `embed(tokens [B, T], positions [T])` gives the residual stream and the rotary tables `[T, R]`."""

    model: nn.Module
    layers: list[Layer]
    embed: Callable[[Tensor, Tensor], tuple[Tensor, Rotation]]
    embedding: nn.Embedding
    position_embedding: nn.Embedding | None
    final_norm: nn.Module
    head: nn.Linear
    num_heads: int
    num_key_value_heads: int
    max_length: int


def matrix(module: nn.Module) -> Tensor:
    """The weight as `[in, out]`, a view: GPT-2's Conv1D stores it so, a linear layer transposed."""
    weight: Any = module.weight
    return weight if type(module).__name__ == "Conv1D" else weight.T


def bias_of(module: nn.Module) -> Tensor:
    bias = getattr(module, "bias", None)
    return matrix(module).new_zeros(matrix(module).shape[1]) if bias is None else bias


def norm_eps(norm: nn.Module) -> float:
    """The ε of a normalization; PyTorch says `eps`, transformers' RMSNorms `variance_epsilon`."""
    eps = getattr(norm, "eps", getattr(norm, "variance_epsilon", None))
    return torch.finfo(norm.weight.dtype).eps if eps is None else eps


def subtracts_mean(norm: nn.Module) -> bool:
    return isinstance(norm, nn.LayerNorm)


def adapt(model: nn.Module) -> Decoder:
    """The parts of a house model or of a transformers model of one of the families in `FAMILIES`."""
    if isinstance(model, HouseModel):
        return _house(model)
    kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    if kind not in FAMILIES:
        raise UserError(f"models of type {kind!r} have no adapter: supported are house, {', '.join(FAMILIES)}")
    return FAMILIES[kind](model)


def _split(num_heads: int) -> Callable[[Tensor], Tensor]:
    return lambda y: y.unflatten(-1, (num_heads, -1))


def _house(model: HouseModel) -> Decoder:
    config = model.config
    layers = []
    for block in model.blocks:
        attention, feed_forward = block.attention, block.feed_forward
        gated = isinstance(feed_forward, SwiGLU)
        layers.append(
            Layer(
                attention_norm=block.attention_norm,
                query=Projection(attention.query, _split(config.num_heads)),
                key=Projection(attention.key, _split(config.key_value_heads)),
                value=Projection(attention.value, _split(config.key_value_heads)),
                output=attention.output,
                scale=config.head_size**-0.5,
                feed_forward_norm=block.feed_forward_norm,
                feed_forward=feed_forward,
                pre=feed_forward.gate if gated else feed_forward.input,
                up=feed_forward.input if gated else None,
                act=functional.silu if gated else feed_forward.act,
                down=feed_forward.output,
            )
        )
    return Decoder(
        model,
        layers,
        model.embed,
        model.embedding,
        model.positions,
        model.norm,
        model.head,
        config.num_heads,
        config.key_value_heads,
        config.max_length,
    )


def _gpt2(model: Any) -> Decoder:
    config, body = model.config, model.transformer

    def fused(part: int) -> Callable[[Tensor], Tensor]:
        return lambda y: y.unflatten(-1, (3, config.n_head, -1))[..., part, :, :]

    layers = [
        Layer(
            attention_norm=block.ln_1,
            query=Projection(block.attn.c_attn, fused(0)),
            key=Projection(block.attn.c_attn, fused(1)),
            value=Projection(block.attn.c_attn, fused(2)),
            output=block.attn.c_proj,
            scale=block.attn.scaling,
            feed_forward_norm=block.ln_2,
            feed_forward=block.mlp,
            pre=block.mlp.c_fc,
            act=block.mlp.act,
            down=block.mlp.c_proj,
        )
        for block in body.h
    ]

    def embed(tokens: Tensor, positions: Tensor) -> tuple[Tensor, Rotation]:
        return body.wte(tokens) + body.wpe(positions), None

    return _transformers(model, layers, embed, body.wte, body.wpe, body.ln_f)


def _gpt_neox(model: Any) -> Decoder:
    config, body = model.config, model.gpt_neox

    def interleaved(part: int) -> Callable[[Tensor], Tensor]:
        return lambda y: y.unflatten(-1, (config.num_attention_heads, 3, -1))[..., part, :]

    layers = [
        Layer(
            attention_norm=block.input_layernorm,
            query=Projection(block.attention.query_key_value, interleaved(0)),
            key=Projection(block.attention.query_key_value, interleaved(1)),
            value=Projection(block.attention.query_key_value, interleaved(2)),
            output=block.attention.dense,
            scale=block.attention.scaling,
            feed_forward_norm=block.post_attention_layernorm,
            feed_forward=block.mlp,
            pre=block.mlp.dense_h_to_4h,
            act=block.mlp.act,
            down=block.mlp.dense_4h_to_h,
            parallel=block.use_parallel_residual,
        )
        for block in body.layers
    ]
    embed = partial(_rotary_embed, body.embed_in, body.rotary_emb)
    return _transformers(model, layers, embed, body.embed_in, None, body.final_layer_norm)


def _opt(model: Any) -> Decoder:
    config, body = model.config, model.model.decoder
    plain = body.project_in is None and body.final_layer_norm is not None and config.layer_norm_elementwise_affine
    if not (plain and config.do_layer_norm_before):
        raise UserError("OPT models that normalize after each layer (opt-350m) are not supported: take another size")
    split = _split(config.num_attention_heads)
    layers = [
        Layer(
            attention_norm=block.self_attn_layer_norm,
            query=Projection(block.self_attn.q_proj, split),
            key=Projection(block.self_attn.k_proj, split),
            value=Projection(block.self_attn.v_proj, split),
            output=block.self_attn.out_proj,
            scale=block.self_attn.scaling,
            feed_forward_norm=block.final_layer_norm,
            feed_forward=lambda x, block=block: block.fc2(block.activation_fn(block.fc1(x))),
            pre=block.fc1,
            act=block.activation_fn,
            down=block.fc2,
        )
        for block in body.layers
    ]
    table = body.embed_positions

    def embed(tokens: Tensor, positions: Tensor) -> tuple[Tensor, Rotation]:
        # The first rows of OPT's table stand for padding.
        return body.embed_tokens(tokens) + functional.embedding(positions + table.offset, table.weight), None

    return _transformers(model, layers, embed, body.embed_tokens, table, body.final_layer_norm)


def _llama(model: Any) -> Decoder:
    """Llama, Mistral and Qwen2, and with experts in place of the feed-forward layer Mixtral and OLMoE."""
    config, body = model.config, model.model
    if getattr(config, "clip_qkv", None) is not None:
        raise UserError("OLMoE models that clip queries, keys and values (clip_qkv) are not supported")
    queries, shared = _split(config.num_attention_heads), _split(config.num_key_value_heads)
    layers = []
    for index, block in enumerate(body.layers):
        attention, mlp = block.self_attn, block.mlp
        layer = Layer(
            attention_norm=block.input_layernorm,
            query=Projection(attention.q_proj, queries, getattr(attention, "q_norm", None)),
            key=Projection(attention.k_proj, shared, getattr(attention, "k_norm", None)),
            value=Projection(attention.v_proj, shared),
            output=attention.o_proj,
            scale=attention.scaling,
            feed_forward_norm=block.post_attention_layernorm,
            feed_forward=mlp,
            window=_window(config, index),
        )
        if hasattr(mlp, "experts"):
            layer.expert_reads = (mlp.gate.weight.movedim(-1, 0), mlp.experts.gate_up_proj.movedim(-1, 0))
        else:
            layer.pre, layer.up, layer.act, layer.down = mlp.gate_proj, mlp.up_proj, mlp.act_fn, mlp.down_proj
        layers.append(layer)
    embed = partial(_rotary_embed, body.embed_tokens, body.rotary_emb)
    return _transformers(model, layers, embed, body.embed_tokens, None, body.norm)


def _window(config: Any, layer: int) -> int | None:
    kinds = getattr(config, "layer_types", None)
    return None if kinds and kinds[layer] == "full_attention" else getattr(config, "sliding_window", None)


def _rotary_embed(
    embedding: nn.Embedding, rotary: Callable[..., tuple[Tensor, Tensor]], tokens: Tensor, positions: Tensor
) -> tuple[Tensor, Rotation]:
    x = embedding(tokens)
    cosine, sine = rotary(x, positions[None])
    return x, (cosine[0], sine[0])


def _transformers(
    model: Any,
    layers: list[Layer],
    embed: Callable[[Tensor, Tensor], tuple[Tensor, Rotation]],
    embedding: nn.Embedding,
    position_embedding: nn.Embedding | None,
    final_norm: nn.Module,
) -> Decoder:
    return Decoder(
        model,
        layers,
        embed,
        embedding,
        position_embedding,
        final_norm,
        model.get_output_embeddings(),
        model.config.num_attention_heads,
        getattr(model.config, "num_key_value_heads", None) or model.config.num_attention_heads,
        model.config.max_position_embeddings,
    )


FAMILIES: dict[str, Callable[[Any], Decoder]] = {
    "gpt2": _gpt2,
    "gpt_neox": _gpt_neox,
    "opt": _opt,
    "llama": _llama,
    "mistral": _llama,
    "qwen2": _llama,
    "mixtral": _llama,
    "olmoe": _llama,
}
