"""Whether weights tell false negatives from true ones, by hand and against scikit-learn."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from ..config import Variant
from ..diagnosis import Diagnosis, auc, correlation, score_slots
from ..features import FeatureInputs
from ..model import KernelNetwork, Models
from .test_sampling import prepared


def test_auc_against_scikit_learn() -> None:
    generator = np.random.default_rng(0)
    scores, positive = generator.integers(6, size=200).astype(float), generator.random(200) < 0.3
    assert auc(scores[positive], scores[~positive]) == pytest.approx(roc_auc_score(positive, scores))
    assert auc(np.ones(3), np.ones(4)) == 0.5
    assert auc(np.array([2.0, 1.0]), np.array([1.0, 0.0])) == pytest.approx(3.5 / 4)
    assert math.isnan(auc(np.array([]), np.ones(2)))


def test_correlation_by_hand() -> None:
    member = np.array([True, True, False, False])
    assert correlation(np.array([2.0, 2, 1, 1]), member) == pytest.approx(1)
    assert correlation(np.array([1.0, 2, 1, 2]), member) == pytest.approx(0)
    assert math.isnan(correlation(np.ones(4), member))
    assert math.isnan(correlation(np.arange(4.0), np.ones(4, bool)))


class Says(torch.nn.Module):
    """A ranker of two members that scores by the only feature, the second member the other way round."""

    members = 2

    def __init__(self) -> None:
        super().__init__()
        self.sign = torch.nn.Parameter(torch.tensor([[1.0], [-1.0]]))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.sign * features[..., 0]


def test_a_diagnosis_by_hand() -> None:
    """Slots 0 and 1 are relevant and pooled; the selection model scores them lowest, or (member 1) highest."""
    data = prepared()
    features = torch.arange(9.0).expand(12, 9)[..., None]
    unlabeled = np.ones((12, 6), bool)
    queries = [np.arange(6), np.arange(6, 12)]
    diagnosis = Diagnosis(data, unlabeled, "bm25", queries)
    found = diagnosis(Models(Says(), Says(), None), FeatureInputs(features), Variant(weights="fixed_selection", tau=4))
    assert found["auc_of_weights"] == [1, 0]
    assert found["auc_of_relevance"] == [0, 1]
    assert found["pool_correlation"][0] < 0 < found["pool_correlation_of_selection"][1]
    slots = data.sources["bm25"][:6].ravel()
    weights = 1 + np.exp(slots / 4)
    assert found["weight_of_true"][0] == pytest.approx(weights[slots > 1].mean())
    assert found["weight_of_false"][0] == pytest.approx(weights[slots < 2].mean())
    assert found["variation_of_weights"][0] == pytest.approx(weights.std() / weights.mean())
    plain = diagnosis(Models(Says()), FeatureInputs(features), Variant())
    assert set(plain) == {"auc_of_relevance", "pool_correlation"}


def test_no_false_negatives_is_not_a_number() -> None:
    data = prepared()
    diagnosis = Diagnosis(data, data.sources["bm25"] > 1, "bm25", [np.arange(12)] * 2, most=4)
    found = diagnosis(Models(Says(), Says()), FeatureInputs(torch.ones(12, 9, 1)), Variant(weights="coupled"))
    assert math.isnan(found["auc_of_weights"][0])
    assert found["variation_of_weights"] == pytest.approx([0, 0], abs=1e-12)
    assert len(diagnosis.rows) == 4


def test_scores_by_slot_have_no_score_for_pads() -> None:
    network = KernelNetwork(1, 4, 0.5, [0, 1])
    features = torch.randn(12, 9, 1)
    slots = np.array([[3, -1], [0, 8]])
    scores = score_slots(network, FeatureInputs(features), slots, np.array([7, 2]))
    assert scores.shape == (2, 2, 2)
    assert (scores[:, 0, 1] == -np.inf).all()
    np.testing.assert_allclose(scores[:, 1, 1], network.eval()(features[2, 8:9])[:, 0].detach(), rtol=1e-6)
