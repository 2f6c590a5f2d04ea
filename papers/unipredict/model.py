"""GPT-2, from scratch or pretrained, and the loss on answers alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from shared.config import UserError
from shared.evaluation.language import IGNORED
from shared.training import Moment

from .config import LanguageModel
from .tokens import Packs, packed_mask

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel


def build_model(settings: LanguageModel, vocab_size: int, *, end: int = 0, seed: int = 0) -> GPT2LMHeadModel:
    """GPT-2 with weights drawn from `seed`, or the pretrained one with two more tokens, [PAD] and [MASK].

    The added embeddings are the mean of the others (published). `UserError` where `pretrained` leads nowhere or has a
    shorter context than asked for.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    if settings.pretrained is None:
        config = GPT2Config(
            vocab_size=vocab_size,
            n_positions=settings.context,
            n_embd=settings.hidden_size,
            n_layer=settings.num_layers,
            n_head=settings.num_heads,
            resid_pdrop=settings.dropout,
            embd_pdrop=settings.dropout,
            attn_pdrop=settings.dropout,
            # The same approximation of GELU as GPT-2's own, in one operation instead of seven.
            activation_function="gelu_pytorch_tanh",
            bos_token_id=end,
            eos_token_id=end,
        )
        return GPT2LMHeadModel(config)
    try:
        model = GPT2LMHeadModel.from_pretrained(settings.pretrained)
    except (OSError, ValueError) as error:
        raise UserError(
            f"language.pretrained: no model at {settings.pretrained!r} ({error}). Give a folder with config.json and "
            "weights, or a name on the Hugging Face hub and a connection to it"
        ) from None
    if model.config.n_positions < settings.context:
        raise UserError(
            f"language.context is {settings.context}, but {settings.pretrained} has positions for "
            f"{model.config.n_positions} tokens"
        )
    known = model.config.vocab_size
    model.resize_token_embeddings(vocab_size, mean_resizing=False)
    with torch.no_grad():
        embedding = model.get_input_embeddings().weight
        embedding[known:] = embedding[:known].mean(dim=0)
    return model


def answer_loss(model: GPT2LMHeadModel, packs: tuple[Tensor, ...]) -> Tensor:
    """Mean cross-entropy in nats over the tokens of answers in some packs, in the order of `Packs`, [B, L] each.

    Only places that predict an answer's token are multiplied by the vocabulary.
    """
    tokens, positions, groups, members, targets = packs
    hidden = model.transformer(
        input_ids=tokens, position_ids=positions, attention_mask=packed_mask(groups, members), use_cache=False
    ).last_hidden_state
    asked = targets != IGNORED
    return functional.cross_entropy(model.lm_head(hidden[asked]).float(), targets[asked])


class Objective:
    """The loss of a batch of pack numbers [B], which are looked up on the model's device."""

    def __init__(self, packs: Packs) -> None:
        self.packs = packs

    def __call__(self, model: nn.Module, batch: tuple[Tensor, ...], moment: Moment) -> Mapping[str, Tensor]:
        (numbers,) = batch
        if self.packs.tokens.device != numbers.device:
            self.packs = Packs(**{name: tensor.to(numbers.device) for name, tensor in vars(self.packs).items()})
        return {"loss": answer_loss(model, tuple(tensor[numbers] for tensor in vars(self.packs).values()))}


def count_parameters(model: nn.Module) -> int:
    """Weights, each counted once: the output layer shares those of the embedding."""
    return sum(weight.numel() for weight in model.parameters())


def training_device() -> torch.device:
    """The GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
