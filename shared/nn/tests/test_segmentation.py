from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from shared.config import UserError
from shared.nn.segmentation import deep_supervision_weights, polynomial_decay, segmentation_loss, soft_dice_loss


def confident(labels: Tensor, num_classes: int) -> Tensor:
    """Logits whose softmax is one-hot."""
    return 100 * functional.one_hot(labels, num_classes).movedim(-1, 1).float()


def test_dice_by_hand() -> None:
    # Foreground probabilities 1/2 and 1/4 on voxels labeled 1 and 0: 1 - 2 · 1/2 / (3/4 + 1).
    foreground = torch.tensor([0.5, 0.25])
    logits = torch.stack([(1 - foreground).log(), foreground.log()])[None]
    labels = torch.tensor([[1, 0]])
    assert soft_dice_loss(logits, labels, epsilon=0).item() == pytest.approx(1 - 1 / 1.75)
    assert soft_dice_loss(logits, labels, epsilon=0.5).item() == pytest.approx(1 - 1.5 / 2.25)


def test_dice_sums_over_the_batch_and_averages_over_foreground_classes() -> None:
    logits, labels = torch.randn(3, 4, 5, 6, 7), torch.randint(0, 4, (3, 5, 6, 7))
    probabilities = logits.softmax(1)
    scores = []
    for c in (1, 2, 3):
        p, g = probabilities[:, c], (labels == c).float()
        scores.append((2 * (p * g).sum() + 1e-5) / (p.sum() + g.sum() + 1e-5))
    torch.testing.assert_close(soft_dice_loss(logits, labels), 1 - torch.stack(scores).mean())


def test_dice_agrees_with_monai() -> None:
    losses = pytest.importorskip("monai.losses")
    logits, labels = torch.randn(2, 3, 4, 4, 4), torch.randint(0, 3, (2, 4, 4, 4))
    theirs = losses.DiceLoss(
        include_background=False, to_onehot_y=True, softmax=True, batch=True, smooth_nr=1e-5, smooth_dr=1e-5
    )
    torch.testing.assert_close(soft_dice_loss(logits, labels), theirs(logits, labels[:, None]))


def test_perfect_and_disjoint_predictions() -> None:
    labels = torch.randint(0, 3, (2, 4, 4, 4))
    assert soft_dice_loss(confident(labels, 3), labels).item() == pytest.approx(0, abs=1e-6)
    assert soft_dice_loss(confident((labels + 1) % 3, 3), labels).item() == pytest.approx(1, abs=1e-4)


def test_classes_absent_from_both_are_left_out() -> None:
    labels = torch.randint(0, 2, (1, 4, 4, 4))
    logits = torch.randn(1, 2, 4, 4, 4)
    never = torch.full((1, 2, 4, 4, 4), -30.0)
    torch.testing.assert_close(soft_dice_loss(torch.cat([logits, never], 1), labels), soft_dice_loss(logits, labels))
    # A class that is predicted, but nowhere labeled, scores 0.
    predicted = torch.where(torch.arange(4)[:, None, None] == 0, 2, labels)
    loss = soft_dice_loss(confident(predicted, 3), labels)
    class_1 = soft_dice_loss(confident(torch.where(predicted == 2, 0, predicted), 2), labels)
    assert loss.item() == pytest.approx((class_1.item() + 1) / 2, abs=1e-4)


def test_with_nothing_to_segment_the_dice_loss_is_zero() -> None:
    labels = torch.zeros(1, 4, 4, 4, dtype=torch.long)
    logits = confident(labels, 3).requires_grad_()
    loss = segmentation_loss(logits, labels)
    loss["loss"].backward()
    assert loss["dice"].item() == 0
    assert logits.grad.isfinite().all()


def test_scales_are_averaged_with_weights() -> None:
    assert deep_supervision_weights(1) == [1]
    assert deep_supervision_weights(3) == pytest.approx([4 / 7, 2 / 7, 1 / 7])
    labels = torch.randint(0, 3, (2, 8, 8, 4))
    fine, coarse = torch.randn(2, 3, 8, 8, 4), torch.randn(2, 3, 4, 4, 2)
    both = segmentation_loss([fine, coarse], labels)
    first, second = segmentation_loss(fine, labels), segmentation_loss(coarse, labels[:, ::2, ::2, ::2])
    for term in ("loss", "dice", "cross_entropy"):
        torch.testing.assert_close(both[term], (2 * first[term] + second[term]) / 3)
    torch.testing.assert_close(both["loss"], both["dice"] + both["cross_entropy"])
    torch.testing.assert_close(first["cross_entropy"], functional.cross_entropy(fine, labels))
    torch.testing.assert_close(segmentation_loss([fine, coarse], labels, [0, 1])["loss"], second["loss"])


def test_gradients_in_double_precision() -> None:
    logits = torch.randn(1, 3, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 3, (1, 2, 2, 2))
    assert torch.autograd.gradcheck(lambda x: segmentation_loss(x, labels)["loss"], logits)


def test_half_precision_logits_are_summed_in_single_precision() -> None:
    labels = torch.randint(0, 2, (1, 64, 64, 32))
    logits = torch.randn(1, 2, 64, 64, 32).bfloat16()
    assert soft_dice_loss(logits, labels).item() == pytest.approx(
        soft_dice_loss(logits.double(), labels).item(), rel=1e-4
    )


def test_shapes_that_do_not_fit() -> None:
    logits, labels = torch.zeros(1, 3, 4, 4, 4), torch.zeros(1, 4, 4, 4, dtype=torch.long)
    with pytest.raises(UserError, match=r"given: \[1, 3, 4, 4, 4\] and \[1, 1, 4, 4, 4\]"):
        soft_dice_loss(logits, labels[:, None])
    with pytest.raises(UserError, match="2 for 1 scales"):
        segmentation_loss(logits, labels, [1, 1])
    with pytest.raises(UserError, match="at least one scale"):
        segmentation_loss([], labels)


def test_polynomial_decay() -> None:
    assert polynomial_decay(0.01, 0) == 0.01
    assert polynomial_decay(0.01, 1) == 0
    assert polynomial_decay(0.01, 0.5) == pytest.approx(0.01 * math.exp(0.9 * math.log(0.5)))
    with pytest.raises(UserError, match="from 0 to 1"):
        polynomial_decay(0.01, 1.5)
