from __future__ import annotations

import numpy as np
import pytest

from shared.config import UserError
from shared.data.mad import TASKS, fuzzy_recall, mad
from shared.data.recall import IGNORED

LENGTH, VOCABULARY = 64, 40


def examples(task: str, num_examples: int = 50, seed: int = 0, **options: int | float) -> tuple[np.ndarray, np.ndarray]:
    return mad(task, num_examples, **({"length": LENGTH, "vocab_size": VOCABULARY, "seed": seed} | options))


@pytest.mark.parametrize("task", TASKS)
def test_every_task_has_one_form(task: str) -> None:
    inputs, labels = examples(task)
    assert inputs.shape == labels.shape == (50, LENGTH)
    assert inputs.dtype == labels.dtype == np.int64
    assert inputs.flags.c_contiguous
    assert labels.flags.c_contiguous
    assert 0 <= inputs.min() <= inputs.max() < VOCABULARY
    asked = labels != IGNORED
    assert asked.any(axis=1).all()
    assert 0 <= labels[asked].min() <= labels[asked].max() < VOCABULARY


@pytest.mark.parametrize("task", TASKS)
def test_the_seed_fixes_the_examples(task: str) -> None:
    first, again, other = examples(task), examples(task), examples(task, seed=1)
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.array_equal(first[0], other[0])


def expected_recall(pairs: list[list[int]], noise: set[int]) -> list[int]:
    """Labels at keys and values, by walking through the pairs."""
    labels, known = [], {}
    for key, value in pairs:
        labels += [known.get(key, IGNORED) if key not in noise else IGNORED, IGNORED]
        if key not in noise:
            assert known.setdefault(key, value) == value
    return labels


@pytest.mark.parametrize(("length", "vocab_size"), [(4, 4), (64, 17), (64, 128)])
def test_in_context_recall_asks_for_keys_seen_before(length: int, vocab_size: int) -> None:
    inputs, labels = examples("in_context_recall", length=length, vocab_size=vocab_size)
    assert inputs[:, 0::2].max() < vocab_size // 2 <= inputs[:, 1::2].min()
    for sequence, answers in zip(inputs, labels, strict=True):
        assert answers.tolist() == expected_recall(sequence.reshape(-1, 2).tolist(), set())
    assert (labels[:, -2] == inputs[:, -1]).all()


def test_a_key_has_another_value_in_another_sequence() -> None:
    inputs, _ = examples("in_context_recall", num_examples=200, vocab_size=16)
    after_key_0 = inputs[:, 1::2][inputs[:, 0::2] == 0]
    assert len(set(after_key_0.tolist())) == 8


@pytest.mark.parametrize("noise_fraction", [0.0, 0.2, 0.4, 0.99])
def test_noisy_recall_has_distractors_of_their_own_tokens(noise_fraction: float) -> None:
    inputs, labels = examples(
        "noisy_recall", num_examples=2_000, noise_fraction=noise_fraction, noise_vocab_size=10, vocab_size=VOCABULARY
    )
    noise = set(range(30, 40))
    assert inputs[:, 1::2].min() >= 15
    for sequence, answers in zip(inputs, labels, strict=True):
        assert answers.tolist() == expected_recall(sequence.reshape(-1, 2).tolist(), noise)
    assert (labels[:, -2] == inputs[:, -1]).all()
    is_noise = inputs >= 30
    np.testing.assert_array_equal(is_noise[:, 0::2], is_noise[:, 1::2])
    assert not is_noise[:, -1].any()
    # All pairs but the last and one more may be noise: 30 of 32.
    assert is_noise.mean() == pytest.approx(noise_fraction * 30 / 32, abs=0.01)


def strings(sequence: list[int], first_value_token: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The pairs of a sequence, which are separated by its going back from value tokens to key tokens."""
    pairs: list[tuple[list[int], list[int]]] = []
    before_was_value = True
    for token in sequence:
        is_value = token >= first_value_token
        if before_was_value and not is_value:
            pairs.append(([], []))
        pairs[-1][is_value].append(token)
        before_was_value = is_value
    return [(tuple(key), tuple(value)) for key, value in pairs]


@pytest.mark.parametrize(("vocab_size", "num_keys", "max_string"), [(40, 8, 3), (4, 14, 3), (5, 1, 1), (30, 5, 2)])
def test_fuzzy_recall_asks_for_whole_strings(vocab_size: int, num_keys: int, max_string: int) -> None:
    length = (2 * num_keys + 1) * max_string
    options = {"length": length, "vocab_size": vocab_size, "num_keys": num_keys, "max_string": max_string}
    inputs, labels = fuzzy_recall(100, seed=2, **options)
    sizes = set()
    for sequence, answers in zip(inputs.tolist(), labels.tolist(), strict=True):
        known: dict[tuple[int, ...], tuple[int, ...]] = {}
        expected = []
        pairs = strings(sequence, vocab_size // 2)
        for key, value in pairs[:-1]:
            asked = list(value) if key in known else [IGNORED] * len(value)
            expected += [IGNORED] * (len(key) - 1) + asked + [IGNORED]
            assert known.setdefault(key, value) == value
            sizes.add((len(key), len(value)))
        assert len(known) <= num_keys
        assert answers[: len(expected)] == expected
        # The last pair may be cut off; what is asked of it is known.
        last = [label for label in answers[len(expected) :] if label != IGNORED]
        assert not last or last == list(known[pairs[-1][0]][: len(last)])
        assert any(label != IGNORED for label in answers)
    assert sizes == {(a, b) for a in range(1, max_string + 1) for b in range(1, max_string + 1)}


def test_fuzzy_recall_is_cut_off_anywhere() -> None:
    long, long_labels = fuzzy_recall(30, length=64, vocab_size=40, num_keys=4, seed=0)
    assert (long[:, -1] < 20).any()
    assert (long[:, -1] >= 20).any()
    assert (long_labels[:, -1] != IGNORED).any()


def test_memorize_has_one_dictionary() -> None:
    train, test = examples("memorize", seed=0), examples("memorize", seed=1)
    dictionary: dict[int, int] = {}
    for inputs, labels in (train, test):
        assert (inputs[:, 1::2] == VOCABULARY - 1).all()
        assert (labels[:, 0::2] == IGNORED).all()
        for key, value in zip(inputs[:, 0::2].ravel().tolist(), labels[:, 1::2].ravel().tolist(), strict=True):
            assert dictionary.setdefault(key, value) == value
    assert sorted(dictionary) == list(range(19))
    assert sorted(dictionary.values()) == list(range(19, 38))
    other = examples("memorize", seed=0, dictionary_seed=1)
    np.testing.assert_array_equal(other[0], train[0])
    assert not np.array_equal(other[1], train[1])


@pytest.mark.parametrize(("length", "num_to_copy"), [(64, 16), (33, 16), (7, 1)])
def test_selective_copy_asks_for_the_content_in_order(length: int, num_to_copy: int) -> None:
    inputs, labels = examples("selective_copy", length=length, num_to_copy=num_to_copy)
    blank, marker = VOCABULARY - 2, VOCABULARY - 1
    place = length - num_to_copy - 1
    assert (inputs[:, place] == marker).all()
    assert (inputs[:, place + 1 :] == blank).all()
    assert (labels[:, : place + 1] == IGNORED).all()
    for sequence, answers in zip(inputs, labels, strict=True):
        content = sequence[:place][sequence[:place] != blank]
        assert content.max() < blank
        assert answers[place + 1 :].tolist() == content.tolist()


def test_selective_copy_scatters_evenly() -> None:
    inputs, _ = examples("selective_copy", num_examples=4_000, length=16, num_to_copy=5)
    filled = (inputs[:, :10] < VOCABULARY - 2).mean(axis=0)
    np.testing.assert_allclose(filled, 0.5, atol=0.03)


def test_compress_asks_for_all_the_content_at_its_place() -> None:
    inputs, labels = examples("compress", length=10)
    assert inputs[:, :9].max() == VOCABULARY - 2
    assert (inputs[:, 9] == VOCABULARY - 1).all()
    assert (labels[:, 9] == IGNORED).all()
    np.testing.assert_array_equal(labels[:, :9], inputs[:, :9])


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("recall", {}, r"no task 'recall' in MAD; choose one of compress, fuzzy_recall"),
        ("compress", {"num_keys": 3}, "compress has no option 'num_keys'; its options: none"),
        ("selective_copy", {"blanks": 3}, "its options: num_to_copy"),
        ("memorize", {"length": 7}, "give 6 or 8"),
        ("in_context_recall", {"length": 2}, "give at least 4"),
        ("in_context_recall", {"vocab_size": 3}, "vocab_size of at least 4"),
        ("noisy_recall", {"vocab_size": 19}, "vocab_size of at least 20"),
        ("noisy_recall", {"noise_fraction": 1.0}, "must lie in"),
        ("noisy_recall", {"noise_vocab_size": 0}, "at least 1 token"),
        ("fuzzy_recall", {"length": 50}, "give at least 51"),
        ("fuzzy_recall", {"vocab_size": 4, "max_string": 2}, "2 key tokens make 6 keys of up to 2 tokens"),
        ("fuzzy_recall", {"num_keys": 0}, "must be at least 1"),
        ("selective_copy", {"length": 32}, "give at least 33"),
        ("selective_copy", {"num_to_copy": 0}, "at least 1"),
        ("selective_copy", {"vocab_size": 3}, "vocab_size of at least 4"),
        ("memorize", {"vocab_size": 4}, "vocab_size of at least 5"),
        ("compress", {"num_examples": 0}, "num_examples is 0"),
    ],
)
def test_impossible_requests_are_refused(task: str, options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        examples(task, **options)


@pytest.mark.parametrize(
    ("task", "options"),
    [
        ("in_context_recall", {"length": 4, "vocab_size": 4}),
        ("noisy_recall", {"length": 4, "vocab_size": 20}),
        ("fuzzy_recall", {"length": 51}),
        ("selective_copy", {"length": 33, "vocab_size": 4}),
        ("memorize", {"length": 2, "vocab_size": 5}),
        ("compress", {"length": 2, "vocab_size": 3}),
    ],
)
def test_the_smallest_sizes_named_work(task: str, options: dict) -> None:
    _, labels = examples(task, **options)
    assert (labels != IGNORED).any(axis=1).all()
