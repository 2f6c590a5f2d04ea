"""Low-rank adaptation (LoRA) of the linear maps of a model, by peft, in the model itself.

    W' = W + (α/r) B A,  A [r, d_in] random, B [d_out, r] zero at first

(Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (2021), section 4.1). The model keeps its class and the
way it is called, be it a `shared.nn.LanguageModel` with attention, a `shared.lm.HouseModel` or one of transformers.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from shared.config import UserError, load_optional
from shared.training.checkpoint import load_tensors, save_tensors

# Queries, keys, values and output of attention, under the names that they have here and in transformers' Llama and T5.
ATTENTION_PROJECTIONS = (
    r".*\.(mixer|attention|cross_attention|self_attn)\.(query|key|value|output|[qkvo]_proj)"
    r"|.*\.(SelfAttention|EncDecAttention)\.[qkvo]"
)
FORMAT = "low-rank"
EXTRA = "hyporadise"


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers in a model's parameters, and how many of them are trained."""

    total: int
    trained: int


def add_low_rank(
    model: nn.Module,
    *,
    rank: int = 16,
    alpha: float = 16.0,
    dropout: float = 0.05,
    targets: str = ATTENTION_PROJECTIONS,
) -> nn.Module:
    """Freeze the model and add trained A and B to its linear maps whose whole name matches the pattern `targets`.

    `dropout` acts on what A reads. A is drawn from the current random state (Kaiming's uniform). In place; the model is
    returned. `UserError` where no linear map matches, or where a model has such maps already.
    """
    peft = load_optional("peft", EXTRA)
    if rank < 1 or alpha <= 0 or not 0 <= dropout < 1:
        raise UserError(f"LoRA needs rank ≥ 1, alpha > 0 and 0 ≤ dropout < 1, not {rank}, {alpha} and {dropout}")
    if _adapted(model):
        raise UserError("the model has low-rank maps already: merge them first (merge_low_rank)")
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets, bias="none")
    training = model.training
    try:
        peft.inject_adapter_in_model(config, model)
    except ValueError as error:
        linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        raise UserError(
            f"no low-rank maps can be added for {targets!r}: {str(error).splitlines()[0]} "
            f"(linear maps of the model: {', '.join(linear[:6])} …)"
        ) from None
    return model.train(training)


def merge_low_rank(model: nn.Module) -> nn.Module:
    """Add each (α/r) B A to its W, leave plain linear maps, and thaw nothing: in place; the model is returned."""
    for name, module in _checked(model).items():
        module.merge(safe_merge=True)
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, module.get_base_layer())
    for left in ("peft_config", "active_adapter"):
        if hasattr(model, left):
            delattr(model, left)
    return model


def save_low_rank(path: Path, model: nn.Module) -> None:
    """Write A and B of all low-rank maps, and how they were made, to one safetensors file."""
    adapted = _checked(model)
    module = next(iter(adapted.values()))
    dropout = module.lora_dropout["default"]
    note = {
        "format": FORMAT,
        "rank": module.r["default"],
        "alpha": module.lora_alpha["default"],
        "dropout": dropout.p if isinstance(dropout, nn.Dropout) else 0.0,
        "modules": list(adapted),
    }
    save_tensors(path, _matrices(adapted), note)


def load_low_rank(path: Path, model: nn.Module) -> nn.Module:
    """Load what `save_low_rank` wrote into the same model; one without low-rank maps gets them. In place.

    `UserError` for a file of another kind or damaged, and where its maps are not those of the model.
    """
    tensors, note = load_tensors(path)
    if note.get("format") != FORMAT:
        raise UserError(f"{path} holds no low-rank maps: give a file that save_low_rank wrote")
    if not _adapted(model):
        names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        lacking = sorted(set(note["modules"]) - set(names))
        if lacking:
            raise UserError(f"{path} is of another model: this one has no linear map {lacking[0]}")
        pattern = "|".join(name.replace(".", r"\.") for name in note["modules"])
        # What is drawn at first is replaced, and must not move the caller's random numbers.
        with torch.random.fork_rng(devices=[]):
            add_low_rank(model, rank=note["rank"], alpha=note["alpha"], dropout=note["dropout"], targets=pattern)
    adapted = _adapted(model)
    module = next(iter(adapted.values()))
    own = _matrices(adapted)
    if (module.r["default"], module.lora_alpha["default"]) != (note["rank"], note["alpha"]) or {
        name: tensor.shape for name, tensor in own.items()
    } != {name: tensor.shape for name, tensor in tensors.items()}:
        raise UserError(
            f"{path} does not fit the model's low-rank maps: make them with the same rank, alpha and targets"
        )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(tensors[name])
    return model


def parameter_counts(model: nn.Module) -> ParameterCounts:
    """All numbers of a model's parameters, tied ones once, and the trained ones among them."""
    parameters = list(model.parameters())
    trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    return ParameterCounts(sum(parameter.numel() for parameter in parameters), trained)


def _adapted(model: nn.Module) -> dict[str, Any]:
    """The low-rank maps of a model by name."""
    layer = load_optional("peft", EXTRA).tuners.lora.LoraLayer
    return {name: module for name, module in model.named_modules() if isinstance(module, layer)}


def _checked(model: nn.Module) -> dict[str, Any]:
    adapted = _adapted(model)
    if not adapted:
        raise UserError("the model has no low-rank maps: add them first (add_low_rank)")
    return adapted


def _matrices(adapted: dict[str, Any]) -> dict[str, torch.Tensor]:
    matrices = {}
    for name, module in adapted.items():
        matrices[f"{name}.A"] = module.lora_A["default"].weight
        matrices[f"{name}.B"] = module.lora_B["default"].weight
    return matrices
