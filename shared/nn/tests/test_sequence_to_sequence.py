from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from shared.config import UserError
from shared.nn.beam_search import beam_search
from shared.nn.sequence_to_sequence import (
    SequenceToSequence,
    mixed_log_probs,
    sequence_loss,
    sinusoidal_positions,
    smoothed_loss,
)

VOCAB = 11
SOURCE = torch.tensor([[5, 6, 12, 4, 5, 11, 7], [8, 9, 0, 0, 0, 0, 0]])
RANKS = torch.tensor([[1, 1, 1, 1, 2, 2, 2], [1, 1, 0, 0, 0, 0, 0]])
POSITIONS = torch.tensor([[0, 1, 2, 3, 0, 1, 2], [0, 1, 0, 0, 0, 0, 0]])
TARGET = torch.tensor([[2, 5, 12, 7, 3], [2, 9, 3, 0, 0]])
GIVEN = {"ranks": RANKS, "positions": POSITIONS}


def model_of(**options: Any) -> SequenceToSequence:
    options = {"num_ranks": 2, "dropout": 0.0, **options}
    return SequenceToSequence(VOCAB, 8, 2, 2, 2, 16, **options).double().eval()


@pytest.mark.parametrize("copy", [True, False])
def test_distributions_sum_to_one(copy: bool) -> None:
    model = model_of(copy=copy)
    log_probs = model(SOURCE, TARGET, **GIVEN)
    assert log_probs.shape == (2, 5, 13 if copy else VOCAB)
    torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(2, 5, dtype=torch.float64))
    if copy:
        # Words 11 and 12 are the first source's own.
        assert log_probs[0, :, 11:].isfinite().all()
        assert (log_probs[1, :, 11:] == -torch.inf).all()


@pytest.mark.parametrize("pieces", [[1] * 5, [2, 3], [4, 1]])
@pytest.mark.parametrize("copy", [True, False])
def test_cached_decoding_is_the_full_forward_pass(pieces: list[int], copy: bool) -> None:
    model = model_of(copy=copy)
    expected, memory = model(SOURCE, TARGET, **GIVEN), model.encode(SOURCE, **GIVEN)
    state, outputs = None, []
    for piece in TARGET.split(pieces, dim=1):
        log_probs, state = model.decode(piece, memory, state)
        outputs.append(log_probs)
    torch.testing.assert_close(torch.cat(outputs, dim=1), expected, rtol=0, atol=1e-12)


def test_rows_of_a_beam_share_their_source() -> None:
    model = model_of()
    targets = torch.randint(2, VOCAB, (6, 4))
    rows, _ = model.decode(targets, model.encode(SOURCE, **GIVEN))
    for number, target in enumerate(targets):
        alone = model(
            SOURCE[number // 3, None],
            target[None],
            RANKS[number // 3, None],
            POSITIONS[number // 3, None],
            extended_size=13,
        )
        torch.testing.assert_close(rows[number], alone[0], rtol=0, atol=1e-12)


def test_masked_places_are_those_of_the_whole() -> None:
    model = model_of()
    mask = torch.tensor([[True, False, True, True, False], [False, True, False, False, False]])
    chosen = model(SOURCE, TARGET, mask=mask, **GIVEN)
    torch.testing.assert_close(chosen, model(SOURCE, TARGET, **GIVEN)[mask], rtol=0, atol=1e-12)


def test_copies_by_definition() -> None:
    model = model_of().requires_grad_(False)
    memory = model.encode(SOURCE, **GIVEN)
    features, embedded, _ = model._features(TARGET, memory, None)
    assert model.copy_head is not None
    _, attention, _, _ = model.copy_head.attend(features, memory=memory, embedded=embedded)
    torch.testing.assert_close(attention.sum(-1), torch.ones(2, 5, dtype=torch.float64))
    assert (attention[1, :, 2:] == 0).all()
    vocabulary = functional.linear(features, model.embedding.weight).softmax(-1)
    log_probs, switch = model(SOURCE, TARGET, **GIVEN), model.copy_head.switch
    for row in range(2):
        for place in range(5):
            a = attention[row, place]
            context = sum(a[i] * memory.states[row, i] for i in range(7))
            inputs = torch.cat([context, features[row, place], embedded[row, place]])
            generate = torch.sigmoid(switch.weight[0] @ inputs + switch.bias[0])
            for word in range(13):
                copied = sum(a[i] for i in range(7) if SOURCE[row, i] == word)
                generated = vocabulary[row, place, word] if word < VOCAB else 0
                expected = generate * generated + (1 - generate) * copied
                assert log_probs[row, place, word].exp().item() == pytest.approx(float(expected), abs=1e-12)


@pytest.mark.parametrize(("bias", "generates"), [(1e4, True), (-1e4, False)])
def test_switch_at_its_ends(bias: float, generates: bool) -> None:
    model = model_of()
    assert model.copy_head is not None
    with torch.no_grad():
        model.copy_head.switch.bias.fill_(bias)
    memory = model.encode(SOURCE, **GIVEN)
    features, embedded, _ = model._features(TARGET, memory, None)
    probabilities = model(SOURCE, TARGET, **GIVEN).exp()
    if generates:
        expected = functional.linear(features, model.embedding.weight).softmax(-1)
        torch.testing.assert_close(probabilities[..., :VOCAB], expected)
        assert (probabilities[..., VOCAB:] == 0).all()
    else:
        _, attention, tokens, _ = model.copy_head.attend(features, embedded, memory)
        expected = torch.zeros(2, 5, 13, dtype=torch.float64).scatter_add(-1, tokens, attention)
        torch.testing.assert_close(probabilities, expected)
        assert probabilities[1, :, [3, 5, 6]].max() < 1e-300


@pytest.mark.parametrize("copy", [True, False])
def test_padding_changes_nothing(copy: bool) -> None:
    model = model_of(copy=copy)
    expected = model(SOURCE[1:, :2], TARGET[1:, :3], RANKS[1:, :2], POSITIONS[1:, :2])
    padded = model(SOURCE, TARGET, **GIVEN)
    torch.testing.assert_close(padded[1:, :3, :VOCAB], expected, rtol=0, atol=1e-12)
    # Whatever ranks and positions pads have.
    ranks, positions = RANKS.masked_fill(SOURCE == 0, 2), POSITIONS.masked_fill(SOURCE == 0, 9)
    torch.testing.assert_close(model(SOURCE, TARGET, ranks, positions), padded, rtol=0, atol=1e-12)


def test_order_of_the_source_counts_only_by_positions_and_ranks() -> None:
    model = model_of()
    order = torch.randperm(7)
    expected = model(SOURCE, TARGET, **GIVEN)
    moved = model(SOURCE[:, order], TARGET, RANKS[:, order], POSITIONS[:, order])
    torch.testing.assert_close(moved, expected, rtol=0, atol=1e-12)
    assert (model(SOURCE[:, order], TARGET, RANKS, POSITIONS) - expected).abs()[0].max() > 1e-3


def test_ranks_and_positions_are_read() -> None:
    model = model_of()
    expected = model(SOURCE, TARGET, **GIVEN)[0]
    assert (model(SOURCE, TARGET, (3 - RANKS).clamp(max=2), POSITIONS)[0] - expected).abs().max() > 1e-3
    default = model(SOURCE, TARGET, RANKS)
    torch.testing.assert_close(model(SOURCE, TARGET, RANKS, torch.arange(7).expand(2, 7)), default)
    assert (default[0] - expected).abs().max() > 1e-3


def test_words_outside_of_the_vocabulary_are_read_as_unknown() -> None:
    model = model_of(copy=False)
    unknown = SOURCE.masked_fill(SOURCE >= VOCAB, 1)
    torch.testing.assert_close(model(SOURCE, TARGET, **GIVEN), model(unknown, TARGET.clamp(max=VOCAB), **GIVEN))


def test_a_source_of_pads_only_gives_numbers() -> None:
    model = model_of()
    log_probs = model(torch.zeros_like(SOURCE), TARGET, **GIVEN)
    assert log_probs[..., 0].isfinite().all()


def test_later_targets_are_hidden() -> None:
    model = model_of()
    changed = TARGET.clone()
    changed[:, 3:] = 8
    torch.testing.assert_close(
        model(SOURCE, changed, **GIVEN)[:, :3], model(SOURCE, TARGET, **GIVEN)[:, :3], rtol=0, atol=1e-12
    )


def test_positions_by_hand() -> None:
    # sin 0, cos 0, …; sin 3, cos 3, sin 0.03, cos 0.03 with 10000^(2/4) = 100.
    expected = torch.tensor([[0.0, 1.0, 0.0, 1.0], [math.sin(3), math.cos(3), math.sin(0.03), math.cos(0.03)]])
    torch.testing.assert_close(sinusoidal_positions(torch.tensor([0, 3]), 4), expected)


def test_smoothed_loss_by_hand() -> None:
    probabilities = torch.tensor([[0.5, 0.25, 0.25, 0.0], [0.1, 0.2, 0.3, 0.4]])
    log_probs = probabilities.log()
    # Three words of the vocabulary; the fourth is the second source's own.
    smooth = -sum(math.log(p) for p in (0.5, 0.25, 0.25, 0.1, 0.2, 0.3)) / 6
    expected = 0.9 * -(math.log(0.25) + math.log(0.4)) / 2 + 0.1 * smooth
    targets = torch.tensor([1, 3])
    assert smoothed_loss(log_probs, targets, 3, 0.1).item() == pytest.approx(expected, rel=1e-6)
    assert smoothed_loss(log_probs, targets, 3, 0.0).item() == pytest.approx(
        functional.nll_loss(log_probs, targets).item()
    )
    # Over a whole vocabulary it is PyTorch's.
    logits = torch.randn(5, 7)
    labels = torch.randint(7, (5,))
    torch.testing.assert_close(
        smoothed_loss(logits.log_softmax(-1), labels, 7, 0.2),
        functional.cross_entropy(logits, labels, label_smoothing=0.2),
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_is_that_of_the_tokens_that_are_no_pads(smoothing: float) -> None:
    model = model_of()
    loss = sequence_loss(model, SOURCE, TARGET, label_smoothing=smoothing, **GIVEN)
    log_probs = model(SOURCE, TARGET[:, :-1], **GIVEN)
    kept = [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1)]
    rows = torch.stack([log_probs[row, place] for row, place in kept])
    targets = torch.stack([TARGET[row, place + 1] for row, place in kept])
    torch.testing.assert_close(loss, smoothed_loss(rows, targets, VOCAB, smoothing))
    loss.backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)


def test_mixed_precision() -> None:
    model = model_of(num_ranks=2).float()
    expected = model(SOURCE, TARGET, **GIVEN)
    with torch.autocast("cpu", torch.bfloat16):
        log_probs = model(SOURCE, TARGET, **GIVEN)
        loss = sequence_loss(model, SOURCE, TARGET, **GIVEN)
    assert log_probs.dtype == torch.float32
    torch.testing.assert_close(log_probs.exp(), expected.exp(), rtol=0, atol=0.05)
    loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_loss_stays_finite_where_probabilities_vanish() -> None:
    logits = torch.tensor([[200.0, -200.0, 0.0]], requires_grad=True)
    switch = torch.tensor([[1.0]], requires_grad=True)
    copied, tokens = torch.tensor([[1.0, 0.0]]), torch.tensor([[0, 3]])
    log_probs = mixed_log_probs(logits, switch, copied, tokens, 5)
    assert log_probs[0, :3].isfinite().all()
    assert (log_probs[0, 3:] == -torch.inf).all()
    smoothed_loss(log_probs, torch.tensor([0]), 3, 0.1).backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_learns_to_copy_words_it_has_never_seen() -> None:
    model = SequenceToSequence(6, 16, 2, 1, 1, 32, dropout=0.0)
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)

    def batch(size: int) -> tuple[Tensor, Tensor]:
        # Three unknown words in random order, to be said in the order in which they stand.
        source = torch.rand(size, 3).argsort(dim=1) + 6
        return source, torch.cat([torch.full((size, 1), 2), source, torch.full((size, 1), 3)], dim=1)

    for _ in range(150):
        loss = sequence_loss(model, *batch(32), label_smoothing=0.0, extended_size=9)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    source, target = batch(20)
    model.eval()
    with torch.no_grad():
        memory = model.encode(source)
        found = beam_search(model.step_function(memory), torch.full((20,), 2), end_token=3, beam_size=2, max_length=6)
    assert (found.tokens[:, 0, :3] == target[:, 1:4]).all(dim=1).float().mean() > 0.9


def test_untied_head_and_counts() -> None:
    tied, untied = model_of(), model_of(tie_embeddings=False)
    assert untied.num_parameters() - tied.num_parameters() == VOCAB * 8
    torch.testing.assert_close(untied(SOURCE, TARGET, **GIVEN).exp().sum(-1), torch.ones(2, 5).double())


def test_dropout_acts_in_training_only() -> None:
    model = model_of(dropout=0.5)
    torch.testing.assert_close(model(SOURCE, TARGET, **GIVEN), model(SOURCE, TARGET, **GIVEN), rtol=0, atol=0)
    model.train()
    assert (model(SOURCE, TARGET, **GIVEN) - model(SOURCE, TARGET, **GIVEN)).abs()[0].max() > 1e-3


def test_clear_errors() -> None:
    with pytest.raises(UserError, match="multiple of num_heads"):
        SequenceToSequence(9, 8, 3, 1, 1, 8)
    with pytest.raises(UserError, match="must be even"):
        SequenceToSequence(9, 9, 3, 1, 1, 8)
    with pytest.raises(UserError, match="at least 1 layer"):
        SequenceToSequence(9, 8, 2, 0, 1, 8)
    with pytest.raises(UserError, match="below vocab_size 1"):
        SequenceToSequence(1, 8, 2, 1, 1, 8)
    model = model_of()
    with pytest.raises(UserError, match="give ranks"):
        model(SOURCE, TARGET)
    with pytest.raises(UserError, match=r"ranks must have the source's shape \[2, 7\]"):
        model(SOURCE, TARGET, RANKS[:, :3])
    with pytest.raises(UserError, match="ranks must lie between 0 and 2"):
        model(SOURCE, TARGET, RANKS + 1)
    with pytest.raises(UserError, match="source must be tokens"):
        model(SOURCE.float(), TARGET, **GIVEN)
    with pytest.raises(UserError, match="target must be tokens"):
        model(SOURCE, TARGET[:, :0], **GIVEN)
    with pytest.raises(UserError, match="number 12: extended_size 12 is too small"):
        model(SOURCE, TARGET, extended_size=12, **GIVEN)
    with pytest.raises(UserError, match="3 rows to decode are no multiple of 2"):
        model.decode(TARGET[[0, 0, 1]], model.encode(SOURCE, **GIVEN))
    with pytest.raises(UserError, match="label_smoothing"):
        smoothed_loss(torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64), 2, 1.0)
