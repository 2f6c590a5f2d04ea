"""The method's equations against slow implementations, its limits, and that members train as if they were alone."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from shared.config import UserError

from ..config import TransformerRanker, Variant
from ..features import FeatureInputs
from ..model import (
    CrossEncoder,
    KernelNetwork,
    Models,
    Pairs,
    accumulate_gradients,
    bert_config,
    build_cross_encoder,
    clip_gradients,
    evaluating,
    inverse_propensity,
    inverse_rejection,
    nonnegative_risk,
    pair_loss,
    parameter_groups,
    scores_of_pairs,
    weights_of,
)

QUERIES, SLOTS, FEATURES, PAIRS = 5, 6, 4, 7
COUPLED = Variant(weights="coupled", tau=1.5)


def setup(members: int = 1, dropout: float = 0.0, seed: int = 0) -> tuple[Models, Pairs, FeatureInputs]:
    generator = torch.Generator().manual_seed(seed)
    relevance = KernelNetwork(FEATURES, 8, dropout, range(members))
    selection = KernelNetwork(FEATURES, 8, dropout, range(100, 100 + members))
    inputs = FeatureInputs(torch.randn(QUERIES, SLOTS, FEATURES, generator=generator))
    shape = (members, PAIRS)
    queries = torch.randint(QUERIES, shape, generator=generator)
    slots = torch.randint(SLOTS, (2, *shape), generator=generator)
    return Models(relevance, selection, relevance), Pairs(queries, *slots), inputs


def gradients(model: nn.Module) -> list[Tensor]:
    return [parameter.grad.clone() for parameter in model.parameters()]


# --- Losses and weights ---


def test_the_pair_loss_is_a_softmax_over_two() -> None:
    positive, negative = torch.randn(9, dtype=torch.float64), torch.randn(9, dtype=torch.float64)
    expected = -torch.log(positive.exp() / (positive.exp() + negative.exp()))
    torch.testing.assert_close(pair_loss(positive, negative), expected)
    assert pair_loss(torch.tensor(1000.0), torch.tensor(-1000.0)) == 0


@pytest.mark.parametrize("tau", [1.0, 2.0, 10.0])
def test_weights_are_those_of_the_paper(tau: float) -> None:
    scores = torch.linspace(-5, 5, 11, dtype=torch.float64)
    torch.testing.assert_close(inverse_rejection(scores, tau), 1 / (1 - torch.sigmoid(scores / tau)))
    torch.testing.assert_close(inverse_propensity(scores, tau), 1 / torch.sigmoid(scores / tau))


def test_weights_at_temperature_ten_by_hand() -> None:
    """Scores within 5 of zero give weights between 1.61 and 2.65."""
    low, high = inverse_rejection(torch.tensor([-5.0, 5.0]), 10).tolist()
    assert (low, high) == pytest.approx((1.6065, 2.6487), abs=1e-4)


def test_the_nonnegative_risk_by_hand() -> None:
    zero = torch.zeros(3)
    # log 2 in every term: π log 2 + max(0, log 2 - π log 2).
    assert nonnegative_risk(zero, zero, 0.3).item() == pytest.approx(0.6931, abs=1e-4)
    # Unlabeled scores so low that the difference would be negative.
    risk = nonnegative_risk(torch.full((3,), 4.0), torch.full((3,), -9.0), 0.3)
    assert risk.item() == pytest.approx(0.3 * nn.functional.softplus(torch.tensor(-4.0)).item())


# --- A step ---


@pytest.mark.parametrize("positives", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
def test_a_step_against_a_loop_over_pairs(positives: bool, normalize: bool) -> None:
    models, pairs, inputs = setup()
    variant = Variant(weights="coupled", tau=1.5, weigh_positives=positives, normalize=normalize)
    losses = accumulate_gradients(models, pairs, inputs, variant, gradient_clip=1e9)
    got = [gradients(models.relevance), gradients(models.selection)]

    def score(model: nn.Module, query: int, slot: int) -> Tensor:
        return model(inputs.features[query, slot][None])[0, 0]

    rows = list(zip(pairs.queries[0].tolist(), pairs.positives[0].tolist(), pairs.negatives[0].tolist(), strict=True))
    for model, judge, gradient, loss in (
        (models.relevance, models.selection, got[0], losses["relevance"]),
        (models.selection, models.relevance, got[1], losses["selection"]),
    ):
        model.zero_grad()
        weights = []
        for query, positive, negative in rows:
            weight = 1 / (1 - torch.sigmoid(score(judge, query, negative) / 1.5))
            weight = weight / torch.sigmoid(score(judge, query, positive) / 1.5) if positives else weight
            weights.append(weight.item())
        scale = sum(weights) / len(weights) if normalize else 1
        total = torch.zeros(())
        for (query, positive, negative), weight in zip(rows, weights, strict=True):
            both = torch.stack([score(model, query, positive), score(model, query, negative)])
            total = total - weight / scale * torch.log_softmax(both, dim=0)[0] / len(rows)
        total.backward()
        torch.testing.assert_close(loss[0], total.detach())
        torch.testing.assert_close(gradient, gradients(model))


def test_weights_are_taken_without_dropout_and_modes_are_kept() -> None:
    models, pairs, inputs = setup(dropout=0.5)
    models.selection.train()
    first, second = (weights_of(models.selection, pairs, inputs, COUPLED) for _ in range(2))
    assert torch.equal(first, second)
    assert models.selection.training
    assert not first.requires_grad
    with evaluating(models.selection):
        scores = models.selection(*inputs(pairs.queries, pairs.negatives))
    torch.testing.assert_close(first, 1 + torch.exp(scores.detach() / 1.5))


def test_both_losses_are_trained_with_dropout() -> None:
    models, pairs, inputs = setup(dropout=0.5)
    models.relevance.eval()
    torch.manual_seed(0)
    first = accumulate_gradients(models, pairs, inputs, COUPLED, 1.0)
    second = accumulate_gradients(models, pairs, inputs, COUPLED, 1.0)
    assert models.relevance.training
    assert all(first[name] != second[name] for name in first)


def test_a_very_high_temperature_is_twice_the_unweighted_loss() -> None:
    models, pairs, inputs = setup()
    plain = accumulate_gradients(Models(models.relevance), pairs, inputs, Variant(), 1e9)["relevance"]
    of_plain = gradients(models.relevance)
    models.relevance.zero_grad()
    loss = accumulate_gradients(models, pairs, inputs, Variant(weights="coupled", tau=1e9), 1e9)["relevance"]
    torch.testing.assert_close(loss, 2 * plain)
    torch.testing.assert_close(gradients(models.relevance), [2 * each for each in of_plain])


def test_a_fixed_selection_model_is_not_trained() -> None:
    models, pairs, inputs = setup()
    fixed = Models(models.relevance, models.selection, None)
    losses = accumulate_gradients(fixed, pairs, inputs, Variant(weights="fixed_selection", tau=1.5), 1e9)
    assert list(losses) == ["relevance"]
    assert all(parameter.grad is None for parameter in models.selection.parameters())
    models.relevance.zero_grad()
    torch.testing.assert_close(
        losses["relevance"], accumulate_gradients(models, pairs, inputs, COUPLED, 1e9)["relevance"]
    )


def test_a_fixed_relevance_model_weighs_the_selection_loss() -> None:
    models, pairs, inputs = setup()
    judge = KernelNetwork(FEATURES, 8, 0.0, [55])
    losses = accumulate_gradients(Models(models.relevance, models.selection, judge), pairs, inputs, COUPLED, 1e9)
    loss = pair_loss(*scores_of_pairs(models.selection, pairs, inputs))
    torch.testing.assert_close(
        losses["selection"], (weights_of(judge, pairs, inputs, COUPLED) * loss).mean(-1).detach()
    )
    assert all(parameter.grad is None for parameter in judge.parameters())


def test_models_that_start_alike_stay_alike() -> None:
    """Nothing in the objective says which of the two is the selection model."""
    models, pairs, inputs = setup()
    models = Models(models.relevance, copy.deepcopy(models.relevance), models.relevance)
    optimizers = [torch.optim.AdamW(model.parameters(), lr=0.01) for model in models.trained()]
    for _ in range(5):
        accumulate_gradients(models, pairs, inputs, COUPLED, 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(*(list(model.state_dict().values()) for model in models.trained()))


# --- Members ---


def test_members_train_as_if_they_were_alone() -> None:
    together, pairs, inputs = setup(members=3)
    alone = []
    for number in range(3):
        models = Models(KernelNetwork(FEATURES, 8, 0.0, [number]), KernelNetwork(FEATURES, 8, 0.0, [100 + number]))
        alone.append(Models(models.relevance, models.selection, models.relevance))
    for models in (together, *alone):
        number = alone.index(models) if models in alone else slice(None)
        part = slice(number, number + 1) if isinstance(number, int) else number
        own = Pairs(pairs.queries[part], pairs.positives[part], pairs.negatives[part])
        optimizers = [torch.optim.AdamW(model.parameters(), lr=0.05) for model in models.trained()]
        for _ in range(4):
            accumulate_gradients(models, own, inputs, COUPLED, gradient_clip=0.1)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    for name, weights in together.relevance.state_dict().items():
        torch.testing.assert_close(weights, torch.cat([models.relevance.state_dict()[name] for models in alone]))


def test_each_member_has_its_own_norm() -> None:
    models, pairs, inputs = setup(members=3)
    accumulate_gradients(models, pairs, inputs, COUPLED, 1e9)
    whole = gradients(models.relevance)
    norms = torch.stack([each.flatten(1).square().sum(1) for each in whole]).sum(0).sqrt()
    limit = norms.median().item()
    clip_gradients(models.relevance, limit)
    clipped = torch.stack([each.flatten(1).square().sum(1) for each in gradients(models.relevance)]).sum(0).sqrt()
    torch.testing.assert_close(clipped, norms.clamp(max=limit), rtol=1e-4, atol=0)


def test_one_set_of_features_serves_all_members() -> None:
    network = KernelNetwork(FEATURES, 8, 0.0, [1, 2, 3])
    features = torch.randn(10, FEATURES)
    torch.testing.assert_close(network(features), network(features.expand(3, -1, -1)))
    # A member is a two-layer network.
    hidden = nn.functional.relu(features @ network.weight_in[1] + network.bias_in[1])
    torch.testing.assert_close(network(features)[1], (hidden @ network.weight_out[1] + network.bias_out[1])[:, 0])


# --- The Transformer ---

SMALL = TransformerRanker(hidden_size=16, num_layers=1, num_heads=2, query_tokens=4, document_tokens=6)


def test_decay_spares_biases_and_layer_norms() -> None:
    model = build_cross_encoder(SMALL, 30, 0, autocast=False)
    decayed, spared = parameter_groups(model, 0.01)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert decayed["weight_decay"] == 0.01
    assert spared["weight_decay"] == 0
    assert len(decayed["params"]) + len(spared["params"]) == len(names)
    assert all("LayerNorm" in names[id(p)] or names[id(p)].endswith("bias") for p in spared["params"])
    assert not any("LayerNorm" in names[id(p)] or names[id(p)].endswith("bias") for p in decayed["params"])
    kernel = parameter_groups(KernelNetwork(3, 4, 0.0, [0]), 0.01)
    assert [len(group["params"]) for group in kernel] == [2, 2]


def test_the_cross_encoder_does_not_see_pads() -> None:
    model = build_cross_encoder(SMALL, 30, 0, autocast=False).eval()
    tokens = torch.tensor([[1, 5, 6, 2, 7, 8, 2, 0, 0]])
    types, mask = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 0, 0]]), torch.tensor([[1] * 7 + [0] * 2])
    whole = model(tokens, types, mask)
    assert whole.shape == (1,)
    torch.testing.assert_close(whole, model(tokens[:, :7], types[:, :7], mask[:, :7]), atol=1e-5, rtol=0)
    assert not torch.allclose(whole, model(tokens, torch.zeros_like(types), mask), atol=1e-5)
    torch.testing.assert_close(model(tokens[None], types[None], mask[None]), whole[None])


def test_what_is_new_is_drawn_from_the_seed() -> None:
    first, same, other = (build_cross_encoder(SMALL, 30, seed, autocast=False).head.weight for seed in (1, 1, 2))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_bert_base_has_the_published_number_of_weights() -> None:
    """110 million of BERT-base-uncased, and one linear unit on 768 outputs."""
    from transformers import BertModel

    settings = TransformerRanker(hidden_size=768, num_layers=12, num_heads=12)
    config = bert_config(settings, vocab_size=30522)
    config.max_position_embeddings = 512
    with torch.device("meta"):
        model = CrossEncoder(BertModel(config), 0.2)
    assert sum(parameter.numel() for parameter in model.parameters()) == 109_482_240 + 769


def test_a_pretrained_model_that_is_not_there(tmp_path: Path) -> None:
    settings = SMALL.model_copy(update={"pretrained": str(tmp_path)})
    with pytest.raises(UserError, match=r"there is no BERT at .*config.json, weights and tokenizer"):
        build_cross_encoder(settings, 30, 0, autocast=False)
