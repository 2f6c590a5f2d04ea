"""Kernels against loops over words, features of exact matches, and tokens by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from shared.data.retrieval import Index, ppmi_embeddings

from ..features import (
    KERNEL_MEANS,
    KERNEL_WIDTHS,
    NUM_FEATURES,
    FeatureInputs,
    TokenInputs,
    kernel_features,
    pair_features,
)

TEXTS = ["wing flow flow shock", "", "heat flow layer", "wing body shock wave heat", "layer body"]
QUERIES = ["flow flow shock unknown", "heat", "nothing known"]
DOCUMENTS = np.array([[0, 1, 3], [2, 4, -1], [0, 2, -1]])


@pytest.fixture(scope="module")
def index() -> Index:
    return Index(TEXTS, stem=False)


@pytest.fixture(scope="module")
def embeddings(index: Index) -> np.ndarray:
    return ppmi_embeddings(TEXTS, index.vocabulary, dimensions=4)


def test_kernels_against_loops_over_words(index: Index, embeddings: np.ndarray) -> None:
    found = kernel_features(index, QUERIES, DOCUMENTS, embeddings)
    assert found.shape == (3, 3, 11)

    def vector(word: str) -> np.ndarray:
        row = embeddings[index.vocabulary.numbers[word]]
        return row / np.linalg.norm(row)

    for row, query in enumerate(QUERIES):
        words = [word for word in query.split() if word in index.vocabulary.numbers]
        for place, document in enumerate(DOCUMENTS[row]):
            expected = np.zeros(11)
            for word in words if document >= 0 else ():
                cosines = np.array([vector(word) @ vector(other) for other in TEXTS[document].split()])
                for kernel, (center, width) in enumerate(zip(KERNEL_MEANS, KERNEL_WIDTHS, strict=True)):
                    near = np.exp(-((cosines - center) ** 2) / (2 * width**2)).sum()
                    expected[kernel] += np.log(max(near, 1e-10))
            np.testing.assert_allclose(found[row, place], expected, rtol=1e-3, atol=1e-3)


def test_features_are_standardized_and_empty_documents_have_some(index: Index, embeddings: np.ndarray) -> None:
    features = pair_features(index, QUERIES, DOCUMENTS, embeddings)
    present = DOCUMENTS >= 0
    assert features.shape == (3, 3, NUM_FEATURES)
    assert np.isfinite(features).all()
    np.testing.assert_allclose(features[present].mean(axis=0), 0, atol=1e-5)
    assert not features[~present].any()
    # BM25 and overlap: document 0 has both known words of the first query, document 1 none.
    assert (features[0, 0, -2:] > features[0, 1, -2:]).all()


def test_inputs_pick_features() -> None:
    features = torch.arange(24.0).reshape(2, 3, 4)
    (picked,) = FeatureInputs(features)(torch.tensor([[0, 1]]), torch.tensor([[2, 0]]))
    assert torch.equal(picked, torch.stack([features[0, 2], features[1, 0]])[None])


def test_tokens_by_hand() -> None:
    inputs = TokenInputs(
        query_tokens=torch.tensor([[11, 12, 0], [13, 0, 0]]),
        document_tokens=torch.tensor([[21, 22, 23], [31, 0, 0], [0, 0, 0]]),
        documents=torch.tensor([[1, 0], [0, 2]]),
        cls=1,
        sep=2,
    )
    tokens, types, mask = inputs(torch.tensor([0, 0, 1]), torch.tensor([0, 1, 1]))
    assert tokens.tolist() == [
        [1, 11, 12, 2, 31, 2, 0, 0],
        [1, 11, 12, 2, 21, 22, 23, 2],
        [1, 13, 2, 2, 0, 0, 0, 0],
    ]
    assert types.tolist() == [[0, 0, 0, 0, 1, 1, 0, 0], [0, 0, 0, 0, 1, 1, 1, 1], [0, 0, 0, 1, 0, 0, 0, 0]]
    assert mask.tolist() == [[1] * 6 + [0] * 2, [1] * 8, [1] * 4 + [0] * 4]
    # The same of pairs in any shape.
    folded = inputs(torch.tensor([[0, 0, 1]]), torch.tensor([[0, 1, 1]]))
    assert all(torch.equal(a[0], b) for a, b in zip(folded, (tokens, types, mask), strict=True))
