"""Coupled estimation: a relevance and a selection model of the same form, each weighting the other's pairs.

A document is labelled, l = 1, where it is relevant, r = 1, and was selected for annotation, s = 1:

    P(l=1 | q, d) = P(s=1 | q, d) · P(r=1 | q, d)

Both models R and S are trained on the same pairs (q, d+, d-) of a labelled and a sampled document, with the losses

    L_R = mean of w_R · l_R      w_R = 1 / (1 - σ(f_S(q, d-) / τ))
    L_S = mean of w_S · l_S      w_S = 1 / (1 - σ(f_R(q, d-) / τ))
    l_M = -log( e^f_M(q, d+) / (e^f_M(q, d+) + e^f_M(q, d-)) )        for M in R, S

so that an unlabelled document counts as a negative of R the more, the more likely an annotator has seen it.

A ranker is a module that takes what `inputs(queries, slots)` of `data.py` gives and returns scores [..., pairs]. The
Transformer is one model, [pairs]. `KernelNetwork` holds `members` networks, one a fold and seed, which are trained side
by side, [members, pairs]: losses are means over pairs and sums over members, and gradients are clipped member by
member, so that each is trained as if it were alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from shared.config import UserError

from .config import TransformerRanker, Variant

if TYPE_CHECKING:
    from transformers import BertConfig

Inputs = Callable[[Tensor, Tensor], tuple[Tensor, ...]]
TOKEN_TYPES = 2


# --- Losses and weights -----------------------------------------------------------------------------------------------


def pair_loss(positive: Tensor, negative: Tensor) -> Tensor:
    """Pairwise softmax loss -log(e^f+ / (e^f+ + e^f-)) of scores of any shape."""
    return functional.softplus(negative - positive)


def inverse_rejection(scores: Tensor, tau: float) -> Tensor:
    """Weights of negatives 1/(1 - σ(f/τ)) = 1 + e^(f/τ), of the other model's scores f."""
    return 1 + (scores / tau).exp()


def inverse_propensity(scores: Tensor, tau: float) -> Tensor:
    """Weights of positives 1/σ(f/τ) = 1 + e^(-f/τ): the textbook form, which the paper's code leaves out."""
    return 1 + (-scores / tau).exp()


def nonnegative_risk(positive: Tensor, unlabelled: Tensor, prior: float) -> Tensor:
    """Risk of learning from positive and unlabelled data, of scores [..., pairs] to [...].

        π E_P[l(f)] + max(0, E_U[l(-f)] - π E_P[l(-f)])      with the logistic loss l

    Kiryo et al. (2017), equation 6.
    """
    of_positives = prior * functional.softplus(-positive).mean(dim=-1)
    of_negatives = functional.softplus(unlabelled).mean(dim=-1) - prior * functional.softplus(positive).mean(dim=-1)
    return of_positives + of_negatives.clamp(min=0)


# --- One step ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pairs:
    """Pairs of a step: indices of queries and of their candidates' slots, each [members, pairs] or [pairs]."""

    queries: Tensor
    positives: Tensor
    negatives: Tensor

    def to(self, device: torch.device) -> Pairs:
        """The same on a device."""
        return Pairs(self.queries.to(device), self.positives.to(device), self.negatives.to(device))

    def step(self, number: int, *, single: bool = False) -> Pairs:
        """The pairs of one step of an epoch's [members, steps, pairs]; of the only member [pairs] with `single`."""
        parts = (part[:, number] for part in (self.queries, self.positives, self.negatives))
        return Pairs(*(part[0] if single else part for part in parts))


@dataclass(frozen=True)
class Models:
    """Who is trained and who weighs.

    `selection` gives w_R and is None where pairs are not weighted. `judge` gives w_S: R itself in coupled estimation, a
    fixed model or None, in which case `selection` is fixed and not trained.
    """

    relevance: nn.Module
    selection: nn.Module | None = None
    judge: nn.Module | None = None

    def trained(self) -> list[nn.Module]:
        """The models that a step changes, R first."""
        return [self.relevance] + ([self.selection] if self.selection is not None and self.judge is not None else [])


def weights_of(judge: nn.Module, pairs: Pairs, inputs: Inputs, variant: Variant) -> Tensor:
    """Weights of pairs by a model that judges them: in evaluation mode, without gradient."""
    with evaluating(judge), torch.no_grad():
        weights = inverse_rejection(judge(*inputs(pairs.queries, pairs.negatives)).float(), variant.tau)
        if variant.weigh_positives:
            weights = weights * inverse_propensity(judge(*inputs(pairs.queries, pairs.positives)).float(), variant.tau)
        if variant.normalize:
            weights = weights / weights.mean(dim=-1, keepdim=True)
    return weights


def accumulate_gradients(
    models: Models, pairs: Pairs, inputs: Inputs, variant: Variant, gradient_clip: float
) -> dict[str, Tensor]:
    """Steps 1 to 3 of the algorithm: weigh with both models as they are, then both losses and their clipped gradients.

    Returns the losses, detached, each [members] or a scalar; updating is the caller's.
    """
    weights: dict[nn.Module, Tensor] = {}
    if models.selection is not None:
        weights[models.relevance] = weights_of(models.selection, pairs, inputs, variant)
        if models.judge is not None:
            weights[models.selection] = weights_of(models.judge, pairs, inputs, variant)
    losses = {}
    for name, model in zip(("relevance", "selection"), models.trained(), strict=False):
        model.train()
        positive, negative = scores_of_pairs(model, pairs, inputs)
        if variant.objective == "nnpu":
            loss = nonnegative_risk(positive, negative, variant.prior)
        else:
            loss = pair_loss(positive, negative)
            loss = (loss * weights[model] if model in weights else loss).mean(dim=-1)
        loss.sum().backward()
        clip_gradients(model, gradient_clip)
        losses[name] = loss.detach()
    return losses


def scores_of_pairs(model: nn.Module, pairs: Pairs, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Scores of positives and negatives, from one call of the model, in float32."""
    queries = torch.cat([pairs.queries, pairs.queries], dim=-1)
    scores = model(*inputs(queries, torch.cat([pairs.positives, pairs.negatives], dim=-1))).float()
    return scores.chunk(2, dim=-1)  # type: ignore[return-value]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, without dropout, and back to the mode of before."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def clip_gradients(model: nn.Module, max_norm: float) -> None:
    """Clip the norm of the gradient, of each member for itself where the model holds several."""
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    if not hasattr(model, "members"):
        nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        return
    squares = torch.stack([gradient.flatten(1).square().sum(dim=1) for gradient in gradients]).sum(dim=0)
    # As in torch.nn.utils.clip_grad_norm_.
    factor = (max_norm / (squares.sqrt() + 1e-6)).clamp(max=1)
    for gradient in gradients:
        gradient.mul_(factor.view(-1, *[1] * (gradient.ndim - 1)))


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Groups of an optimizer: weight decay on all but biases and layer norms."""
    norms = {id(p) for module in model.modules() if isinstance(module, nn.LayerNorm) for p in module.parameters()}
    decayed, spared = [], []
    for name, parameter in model.named_parameters():
        is_spared = id(parameter) in norms or name.rpartition(".")[2].startswith("bias")
        (spared if is_spared else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": spared, "weight_decay": 0.0}]


# --- Rankers ----------------------------------------------------------------------------------------------------------


class KernelNetwork(nn.Module):
    """The network on top of KNRM's features, `hidden_size` units and one output, `members` of it at once.

    Features [members, pairs, F], or [pairs, F] for all members, to scores [members, pairs]. Weights are drawn as
    those of `nn.Linear`, of each member from its own seed: a member does not depend on which others there are.
    Xiong et al. (2017), section 3, with frozen embeddings; features are in `features.py`.
    """

    def __init__(self, num_features: int, hidden_size: int, dropout: float, seeds: Sequence[int]) -> None:
        super().__init__()
        self.members = len(seeds)
        self.dropout = nn.Dropout(dropout)

        def draw(*shapes: tuple[int, ...]) -> list[nn.Parameter]:
            tensors = [torch.empty(self.members, *shape) for shape in shapes]
            for member, seed in enumerate(seeds):
                generator = torch.Generator().manual_seed(seed)
                for tensor, fan_in in zip(tensors, (num_features, num_features, hidden_size, hidden_size), strict=True):
                    bound = 1 / math.sqrt(fan_in)
                    tensor[member].uniform_(-bound, bound, generator=generator)
            return [nn.Parameter(tensor) for tensor in tensors]

        self.weight_in, self.bias_in, self.weight_out, self.bias_out = draw(
            (num_features, hidden_size), (1, hidden_size), (hidden_size, 1), (1, 1)
        )

    def forward(self, features: Tensor) -> Tensor:
        features = features.expand(self.members, *features.shape[-2:])
        hidden = torch.baddbmm(self.bias_in, features, self.weight_in).relu()
        return torch.baddbmm(self.bias_out, self.dropout(hidden), self.weight_out).squeeze(-1)


class CrossEncoder(nn.Module):
    """BERT over [CLS] query [SEP] document [SEP], tanh of the first token's output, dropout, one linear unit.

    Tokens, token types and mask, each [..., length] integers, to scores [...]. `bert` is a Hugging Face BertModel.
    """

    def __init__(self, bert: nn.Module, dropout: float, *, autocast: bool = False) -> None:
        super().__init__()
        self.bert = bert
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(bert.config.hidden_size, 1)
        self.autocast = autocast

    def forward(self, tokens: Tensor, types: Tensor, mask: Tensor) -> Tensor:
        with torch.autocast(tokens.device.type, torch.bfloat16) if self.autocast else nullcontext():
            shape, length = tokens.shape[:-1], tokens.shape[-1]
            pooled = self.bert(
                input_ids=tokens.reshape(-1, length),
                token_type_ids=types.reshape(-1, length),
                attention_mask=mask.reshape(-1, length),
            ).pooler_output
            return self.head(self.dropout(pooled)).reshape(shape)


def bert_config(settings: TransformerRanker, vocab_size: int) -> BertConfig:
    """The shape of a Transformer that is trained from scratch: BERT's, with an inner size of four times the outer."""
    from transformers import BertConfig

    return BertConfig(
        vocab_size=vocab_size,
        hidden_size=settings.hidden_size,
        num_hidden_layers=settings.num_layers,
        num_attention_heads=settings.num_heads,
        intermediate_size=4 * settings.hidden_size,
        max_position_embeddings=settings.query_tokens + settings.document_tokens + 3,
        type_vocab_size=TOKEN_TYPES,
        hidden_dropout_prob=settings.dropout,
        attention_probs_dropout_prob=settings.dropout,
    )


def build_cross_encoder(settings: TransformerRanker, vocab_size: int, seed: int, *, autocast: bool) -> CrossEncoder:
    """A cross-encoder, from a pretrained BERT or from scratch; what is new in it is drawn from `seed`.

    `UserError` where there is no such pretrained model, or none of BERT's kind.
    """
    from transformers import BertModel

    torch.manual_seed(seed)
    if settings.pretrained is None:
        bert = BertModel(bert_config(settings, vocab_size))
    else:
        dropout = {"hidden_dropout_prob": settings.dropout, "attention_probs_dropout_prob": settings.dropout}
        try:
            bert = BertModel.from_pretrained(settings.pretrained, **dropout)
        except (OSError, ValueError) as error:
            raise UserError(
                f"there is no BERT at {settings.pretrained!r} ({str(error).splitlines()[0]}): give 'pretrained' in "
                "params.yaml the name of a model on the Hugging Face hub, or a folder with config.json, weights and "
                "tokenizer"
            ) from None
        longest = settings.query_tokens + settings.document_tokens + 3
        if longest > bert.config.max_position_embeddings:
            raise UserError(
                f"{settings.pretrained} takes {bert.config.max_position_embeddings} tokens, and query_tokens + "
                f"document_tokens + 3 are {longest}: lower document_tokens"
            )
    torch.manual_seed(seed)
    return CrossEncoder(bert, settings.dropout, autocast=autocast)
