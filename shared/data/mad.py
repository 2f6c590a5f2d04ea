"""The six token tasks of mechanistic architecture design (MAD), by which small models are compared.

A set of examples is a pair of int64 arrays, inputs and labels, each [num_examples, length], tokens below `vocab_size`.
The label at a position is the token that a causal model should give out there (in `compress`: a decoder, for that
place); `IGNORED` marks positions where nothing is asked. `seed` fixes the examples. The function of each task
describes its sequences:

    compress           c1 c2 … cm C              all of c1 … cm, decoded from the output at C
    fuzzy_recall       ka kb va kc vb vc …       keys and values are strings of one to three tokens
    in_context_recall  k v k v k v …             the value of a key that the sequence has shown before
    memorize           k _ k _ k _ …             the value of a key in a dictionary that no sequence shows
    noisy_recall       k v n n k v …             in_context_recall with pairs of distractors n
    selective_copy     _ c1 _ _ c2 … C _ _ …     after C, the scattered c1 c2 … in order

Source: Poli et al. 2024, "Mechanistic design and scaling of hybrid architectures" (arXiv 2403.17844), section 3.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np

from shared.config import UserError
from shared.data.recall import IGNORED, Tokens, distinct_tokens, draw_distinct, repeats

Examples = tuple[Tokens, Tokens]


def mad(task: str, num_examples: int, *, length: int, vocab_size: int, seed: int, **options: Any) -> Examples:
    """Inputs and labels, [num_examples, length] each, of the task named `task`, one of `TASKS`.

    `options` are the further parameters of the task's function. `UserError` names what is allowed.
    """
    if task not in _TASKS:
        raise UserError(f"there is no task {task!r} in MAD; choose one of {', '.join(TASKS)}")
    function = _TASKS[task]
    known = inspect.signature(function).parameters.keys() - {"num_examples", "length", "vocab_size", "seed"}
    if unknown := sorted(options.keys() - known):
        allowed = ", ".join(sorted(known)) or "none"
        raise UserError(f"{task} has no option {', '.join(map(repr, unknown))}; its options: {allowed}")
    return function(num_examples, length=length, vocab_size=vocab_size, seed=seed, **options)


def in_context_recall(num_examples: int, *, length: int, vocab_size: int, seed: int) -> Examples:
    """Recall of pairs shown in the sequence, [num_examples, length].

    Layout: `key value key value …`, where a key always has the same value within a sequence, and another in the next.
    Keys are tokens 0 … vocab_size // 2 - 1, the rest are values; both are drawn with replacement.
    Labeled: every key that the sequence has shown before, with its value. The last pair always is such a one.
    """
    return noisy_recall(
        num_examples, length=length, vocab_size=vocab_size, noise_fraction=0.0, noise_vocab_size=0, seed=seed
    )


def noisy_recall(
    num_examples: int,
    *,
    length: int,
    vocab_size: int,
    noise_fraction: float = 0.2,
    noise_vocab_size: int = 16,
    seed: int,
) -> Examples:
    """In-context recall among distractors, [num_examples, length].

    Layout and labels are those of `in_context_recall`, except that every pair but the last, and one more, is replaced
    by two distractor tokens with probability `noise_fraction`. Distractors are the last `noise_vocab_size` tokens of
    the vocabulary; keys and values share the others.
    """
    _check(num_examples, length, shortest=4, even=True)
    if not 0 <= noise_fraction < 1:
        raise UserError(f"noise_fraction is {noise_fraction}, but must lie in [0, 1)")
    if noise_vocab_size < (noise_fraction > 0):
        raise UserError(f"noise_vocab_size is {noise_vocab_size}, but distractors need at least 1 token")
    num_keys = (vocab_size - noise_vocab_size) // 2
    _check_vocabulary(vocab_size, smallest=noise_vocab_size + 4, holds="two keys, two values and the distractors")
    first_distractor = vocab_size - noise_vocab_size

    rng = np.random.default_rng(seed)
    rows, num_pairs = np.arange(num_examples), length // 2
    keys = rng.integers(num_keys, size=(num_examples, num_pairs))
    is_noise = rng.random((num_examples, num_pairs)) < noise_fraction
    is_noise[rows, rng.integers(num_pairs - 1, size=num_examples)] = False
    is_noise[:, -1] = False
    # A random pair among those that are no distractors lends the last one its key.
    lottery = np.where(is_noise[:, :-1], -1.0, rng.random((num_examples, num_pairs - 1)))
    keys[:, -1] = keys[rows, lottery.argmax(axis=1)]
    dictionaries = rng.integers(num_keys, first_distractor, size=(num_examples, num_keys))
    values = np.take_along_axis(dictionaries, keys, axis=1)
    # Distractors count as keys that never come again.
    seen = repeats(np.where(is_noise, num_keys + np.arange(num_pairs), keys))

    inputs = np.stack([keys, values], axis=2)
    if noise_vocab_size:
        distractors = rng.integers(first_distractor, vocab_size, size=inputs.shape)
        inputs = np.where(is_noise[:, :, None], distractors, inputs)
    labels = np.full((num_examples, length), IGNORED, dtype=np.int64)
    labels[:, 0::2] = np.where(seen, values, IGNORED)
    return inputs.reshape(num_examples, length), labels


def fuzzy_recall(
    num_examples: int,
    *,
    length: int,
    vocab_size: int,
    num_keys: int = 8,
    max_string: int = 3,
    seed: int,
) -> Examples:
    """Recall of pairs whose keys and values are strings of 1 … `max_string` tokens, [num_examples, length].

    Layout: `key value key value …` without separators, cut off at `length`. Each sequence draws a dictionary of
    `num_keys` distinct keys and then pairs of it at random. String lengths are uniform. Key tokens are
    0 … vocab_size // 2 - 1, the rest are value tokens, so that a key ends where its value begins.
    Labeled: for a key that the sequence has shown before, the last token of the key and every token of the value but
    the last, each with the token that follows. Every sequence has such a key: `length` must leave room for one more
    pair than there are keys.
    """
    if num_keys < 1 or max_string < 1:
        raise UserError(f"num_keys ({num_keys}) and max_string ({max_string}) must be at least 1")
    _check(num_examples, length, shortest=(2 * num_keys + 1) * max_string)
    _check_vocabulary(vocab_size, smallest=4, holds="two tokens for keys and two for values")
    base = vocab_size // 2 + 1
    num_strings = sum((base - 1) ** size for size in range(1, max_string + 1))
    if num_strings < num_keys:
        raise UserError(
            f"{base - 1} key tokens make {num_strings} keys of up to {max_string} tokens, which is less than num_keys "
            f"({num_keys}): enlarge vocab_size or max_string, or give a smaller num_keys"
        )
    rng = np.random.default_rng(seed)
    places = np.arange(max_string)

    def draw_strings(shape: tuple[int, ...], num_tokens: int) -> tuple[Tokens, Tokens]:
        sizes = rng.integers(1, max_string + 1, size=shape)
        return sizes, rng.integers(num_tokens, size=(*shape, max_string))

    def draw_codes(shape: tuple[int, ...]) -> Tokens:
        # A string as one number: its tokens are the digits, raised by one, and zero stands for no token.
        sizes, tokens = draw_strings(shape, base - 1)
        return np.where(places < sizes[..., None], tokens + 1, 0) @ base**places

    codes = draw_distinct(draw_codes, num_examples, num_keys)
    key_tokens = codes[:, :, None] // base**places % base - 1
    key_sizes = (key_tokens >= 0).sum(axis=2)
    value_sizes, value_tokens = draw_strings((num_examples, num_keys), vocab_size - base + 1)
    value_tokens += base - 1

    # Pairs are at least two tokens long. One token more than `length` is laid out, to label the last position.
    pairs = rng.integers(num_keys, size=(num_examples, length // 2 + 1))
    seen = repeats(pairs)
    rows = np.arange(num_examples)[:, None]
    key_sizes, value_sizes = key_sizes[rows, pairs], value_sizes[rows, pairs]
    ends = (key_sizes + value_sizes).cumsum(axis=1)
    value_starts = ends - value_sizes
    sequence = np.zeros((num_examples, length + 1), dtype=np.int64)
    asked = np.zeros(sequence.shape, dtype=bool)
    for place in range(max_string):
        for starts, sizes, tokens, is_asked in (
            (value_starts - key_sizes, key_sizes, key_tokens, np.zeros_like(seen)),
            (value_starts, value_sizes, value_tokens, seen),
        ):
            at = starts + place
            row, pair = np.nonzero((place < sizes) & (at <= length))
            sequence[row, at[row, pair]] = tokens[row, pairs[row, pair], place]
            asked[row, at[row, pair]] = is_asked[row, pair]
    return sequence[:, :-1].copy(), np.where(asked[:, 1:], sequence[:, 1:], IGNORED)


def memorize(num_examples: int, *, length: int, vocab_size: int, dictionary_seed: int = 0, seed: int) -> Examples:
    """Recall from the weights: values that no sequence shows, [num_examples, length].

    Layout: `key blank key blank …`. Keys are drawn with replacement from 0 … num_keys - 1, values are the next
    num_keys = (vocab_size - 1) // 2 tokens, the blank is the last token of the vocabulary.
    Labeled: every blank, with the value of the key before it in the one dictionary (keys to distinct values) that
    `dictionary_seed` draws; sets of examples with another `seed` share it.
    """
    _check(num_examples, length, shortest=2, even=True)
    _check_vocabulary(vocab_size, smallest=5, holds="two keys, two values and a blank")
    num_keys = (vocab_size - 1) // 2
    dictionary = num_keys + np.random.default_rng(dictionary_seed).permutation(num_keys)
    keys = np.random.default_rng(seed).integers(num_keys, size=(num_examples, length // 2))
    inputs = np.full((num_examples, length), vocab_size - 1, dtype=np.int64)
    inputs[:, 0::2] = keys
    labels = np.full((num_examples, length), IGNORED, dtype=np.int64)
    labels[:, 1::2] = dictionary[keys]
    return inputs, labels


def selective_copy(num_examples: int, *, length: int, vocab_size: int, num_to_copy: int = 16, seed: int) -> Examples:
    """Copy of content tokens that lie scattered among blanks, [num_examples, length].

    Layout: length - num_to_copy - 1 positions with `num_to_copy` content tokens at random places and blanks elsewhere,
    the copy marker, `num_to_copy` blanks. Content is drawn with replacement from 0 … vocab_size - 3; the blank is token
    vocab_size - 2, the marker vocab_size - 1.
    Labeled: the blanks after the marker, with the content in order.
    """
    if num_to_copy < 1:
        raise UserError(f"num_to_copy is {num_to_copy}, but must be at least 1")
    _check(num_examples, length, shortest=2 * num_to_copy + 1)
    _check_vocabulary(vocab_size, smallest=4, holds="two content tokens, a blank and a marker")
    rng = np.random.default_rng(seed)
    marker = length - num_to_copy - 1
    content = rng.integers(vocab_size - 2, size=(num_examples, num_to_copy))
    places = np.sort(distinct_tokens(rng, num_examples, num_to_copy, 0, marker), axis=1)
    inputs = np.full((num_examples, length), vocab_size - 2, dtype=np.int64)
    np.put_along_axis(inputs, places, content, axis=1)
    inputs[:, marker] = vocab_size - 1
    labels = np.full((num_examples, length), IGNORED, dtype=np.int64)
    labels[:, marker + 1 :] = content
    return inputs, labels


def compress(num_examples: int, *, length: int, vocab_size: int, seed: int) -> Examples:
    """Reconstruction of a random sequence from a model's output at its last token, [num_examples, length].

    Layout: length - 1 content tokens and the compress marker. Content is drawn with replacement from
    0 … vocab_size - 2; the marker is token vocab_size - 1.
    Labeled: every content token with itself, which a decoder has to tell from the output at the marker and the place
    asked for. A causal model that gives out the labels where they stand would have seen them: it needs the decoder.
    """
    _check(num_examples, length, shortest=2)
    _check_vocabulary(vocab_size, smallest=3, holds="two content tokens and a marker")
    inputs = np.full((num_examples, length), vocab_size - 1, dtype=np.int64)
    inputs[:, :-1] = np.random.default_rng(seed).integers(vocab_size - 1, size=(num_examples, length - 1))
    labels = inputs.copy()
    labels[:, -1] = IGNORED
    return inputs, labels


_TASKS: dict[str, Callable[..., Examples]] = {
    "compress": compress,
    "fuzzy_recall": fuzzy_recall,
    "in_context_recall": in_context_recall,
    "memorize": memorize,
    "noisy_recall": noisy_recall,
    "selective_copy": selective_copy,
}
TASKS = tuple(_TASKS)


def _check(num_examples: int, length: int, *, shortest: int, even: bool = False) -> None:
    if num_examples < 1:
        raise UserError(f"num_examples is {num_examples}, but must be at least 1")
    if length < shortest:
        raise UserError(f"a length of {length} is too short for this task: give at least {shortest}")
    if even and length % 2:
        raise UserError(f"a length of {length} does not divide into pairs: give {length - 1} or {length + 1}")


def _check_vocabulary(vocab_size: int, *, smallest: int, holds: str) -> None:
    if vocab_size < smallest:
        raise UserError(f"a vocabulary of {vocab_size} cannot hold {holds}: give a vocab_size of at least {smallest}")
