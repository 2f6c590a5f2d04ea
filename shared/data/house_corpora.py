"""Synthetic documents that train one skill each into a small language model, thousands at a time.

Every generator draws whole arrays: a document is a row of token numbers in which -1 marks an absent token, so that
documents of all lengths and forms of a kind are made by the same few operations. Which tokens follow from what stands
before them is known too (`answers`): that is what abilities are tested on.

A fixed fifth of the combinations is held out: pairs of names in `ioi`, pairs of object and color in `co`, quadruples of
options in `mcq`, nouns in `gt`. Documents of the split `train` never put them together; in those of `test`, the one
that is asked about is a held-out one.
"""

from __future__ import annotations

import difflib
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from shared.config import UserError
from shared.data.house_lexicon import (
    BOS,
    CENTURIES,
    CODES,
    DIGITS,
    FILLERS,
    LABELS,
    NONSENSE,
    SUCCESSOR_PROBABILITIES,
    YEARS,
    Lexicon,
    Tokens,
)

Split = Literal["train", "test"]
Integers = NDArray[np.int64]
Generator = np.random.Generator
ABSENT = -1

INDUCTION_LENGTH = 60
PERIODS = (3, 20)
NUM_QUERIES = 8
MAX_FACTS = 3
CODE_LENGTH = 3
SENTENCE_LENGTHS = (4, 8)
FILLER_LENGTH = 60
NUM_SCENE_OBJECTS = 3
NUM_ARGUMENTS = 6
NUM_OPTIONS = 4
MAX_TERMS = 6
# Documents with n = 2 … 6 terms: enough of the easy ones to learn them, few of the hard ones.
TERM_SHARES = (5, 4, 3, 2, 1)
MAX_DEPTH = 4


@dataclass(frozen=True)
class Documents:
    """Documents of one kind.

    `tokens` [N, L] int32, absent ones -1; `answers` [N, L] bool marks tokens that follow from those before them;
    `details` are facts about each document, [N] or [N, k], that tests are grouped by.
    """

    tokens: Tokens
    answers: NDArray[np.bool_]
    details: dict[str, Integers] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.tokens)

    def compact(self) -> Documents:
        """The same with all absent tokens at the end of their rows, and columns that are absent everywhere left out."""
        absent = self.tokens == ABSENT
        order = absent.argsort(axis=1, kind="stable")[:, : (~absent).sum(axis=1).max(initial=0)]
        tokens, answers = (np.take_along_axis(part, order, axis=1) for part in (self.tokens, self.answers))
        return Documents(tokens, answers & (tokens != ABSENT), self.details)


def generate(kind: str, count: int, rng: Generator, lexicon: Lexicon, split: Split = "train") -> Documents:
    """`count` documents of a kind (see KINDS), each beginning with `<bos>`."""
    _check_kind(kind)
    if count < 1:
        raise UserError(f"at least one document must be asked for (given: {count})")
    if split not in ("train", "test"):
        raise UserError(f"there is no split {split!r}: choose train or test")
    return KINDS[kind](count, rng, lexicon, split)


# ----------------------------------------------------------------------------------------------------------- mixtures


def make_stream(seed: int, split: Split, *names: str | int) -> Generator:
    """Random numbers that no other seed, split or name has."""
    keys = [zlib.crc32(name.encode()) if isinstance(name, str) else name for name in names]
    return np.random.default_rng([seed, ("train", "test").index(split), *keys])


def mix(weights: Mapping[str, float], count: int, rng: Generator, lexicon: Lexicon, split: Split = "train") -> Tokens:
    """`count` documents whose kinds are drawn with the given weights, in random order and end to end: tokens [T]."""
    check_weights(weights)
    kinds = [kind for kind, weight in weights.items() if weight > 0]
    shares = np.array([weights[kind] for kind in kinds], dtype=float)
    drawn = rng.choice(len(kinds), size=count, p=shares / shares.sum())
    parts = {i: generate(kinds[i], int((drawn == i).sum()), rng, lexicon, split).tokens for i in np.unique(drawn)}
    together = np.full((count, max(part.shape[1] for part in parts.values())), ABSENT, dtype=np.int32)
    for index, part in parts.items():
        together[drawn == index, : part.shape[1]] = part
    return together[together != ABSENT]


def check_weights(weights: Mapping[str, float]) -> None:
    """Raise `UserError` for unknown kinds of documents, and for weights that are negative or all zero."""
    for kind in weights:
        _check_kind(kind)
    if min(weights.values(), default=0) < 0 or sum(weights.values()) <= 0:
        raise UserError(f"weights of documents must not be negative, and one must be positive (given: {dict(weights)})")


def _check_kind(kind: str) -> None:
    if kind not in KINDS:
        close = difflib.get_close_matches(kind, KINDS, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise UserError(f"there is no kind of document {kind!r}{hint}; choose among {', '.join(KINDS)}")


def pack(
    weights: Mapping[str, float],
    num_windows: int,
    length: int,
    rng: Generator,
    lexicon: Lexicon,
    split: Split = "train",
) -> Tokens:
    """Windows [num_windows, length + 1] of documents laid end to end; the last of a window's tokens is only a label.

    Documents are cut where a window ends, and nothing keeps attention from crossing from one to the next.
    """
    needed = num_windows * (length + 1)
    streams: list[Tokens] = []
    while (have := sum(map(len, streams))) < needed:
        # Documents are some fifty tokens long.
        streams.append(mix(weights, (needed - have) // 40 + 16, rng, lexicon, split))
    return np.concatenate(streams)[:needed].reshape(num_windows, length + 1)


# ------------------------------------------------------------------------------------------------- drawing, assembling


def distinct(rng: Generator, rows: int, size: int | Integers, count: int) -> Integers:
    """`count` different numbers below `size` (one for all rows, or one a row) in each of `rows` rows, uniformly."""
    picks = np.empty((rows, count), dtype=np.int64)
    for k in range(count):
        # The r-th of those that are left: it moves up by one for every earlier pick that is not above it.
        pick = rng.integers(np.asarray(size) - k, size=rows)
        for earlier in np.sort(picks[:, :k], axis=1).T:
            pick += pick >= earlier
        picks[:, k] = pick
    return picks


def held_out(*indices: Integers) -> NDArray[np.bool_]:
    """Whether combinations of word indices are held out: one in five, spread evenly over the words."""
    return sum(indices) % 5 == 4


def _draw_until(
    draw: Callable[[int], Integers], accept: Callable[[Integers], NDArray[np.bool_]], count: int
) -> Integers:
    """`count` rows of what `draw` gives, refused ones drawn again."""
    rows = draw(count)
    while (refused := ~accept(rows)).any():
        rows[refused] = draw(int(refused.sum()))
    return rows


@dataclass(frozen=True)
class _Answer:
    """Tokens that a model should be able to predict."""

    tokens: Tokens


def _assemble(count: int, lexicon: Lexicon, *parts: str | NDArray | _Answer) -> tuple[Tokens, NDArray[np.bool_]]:
    """Rows made of parts side by side, and where their answers are.

    A part is words that all documents share, or tokens [N], [N, k] of each.
    """
    columns, marks = [], []
    for part in (BOS, *parts):
        is_answer = isinstance(part, _Answer)
        tokens = part.tokens if is_answer else part
        tokens = lexicon.encode(tokens)[None] if isinstance(tokens, str) else tokens.reshape(count, -1)
        columns.append(np.broadcast_to(tokens, (count, tokens.shape[1])).astype(np.int32))
        marks.append(np.full(columns[-1].shape, is_answer))
    tokens = np.concatenate(columns, axis=1)
    return tokens, np.concatenate(marks, axis=1) & (tokens != ABSENT)


def _repeat(lexicon: Lexicon, words: str, *shape: int) -> Tokens:
    """The same words everywhere, [*shape, number of words]."""
    tokens = lexicon.encode(words)
    return np.broadcast_to(tokens, (*shape, len(tokens)))


def _choose(rng: Generator, words: Tokens, *shape: int) -> Tokens:
    return words[rng.integers(len(words), size=shape)]


def _only(present: NDArray[np.bool_], tokens: Tokens) -> Tokens:
    """Tokens where `present`, which has their first axes; absent elsewhere."""
    return np.where(present.reshape(present.shape + (1,) * (tokens.ndim - present.ndim)), tokens, ABSENT)


def _at_random(rng: Generator, segments: Tokens) -> tuple[Tokens, Integers]:
    """Segments [N, S, W] of each document in random order, and the place [N, S] that each has now."""
    order = rng.random(segments.shape[:2]).argsort(axis=1)
    return np.take_along_axis(segments, order[:, :, None], axis=1), order.argsort(axis=1)


# ----------------------------------------------------------------------------------------------------------- copying


def _induction(count: int, rng: Generator, lexicon: Lexicon, split: Split) -> Documents:
    """A random sequence of 3 to 20 words, again and again, 60 words in all; nonsense words in 30 % of documents."""
    period = rng.integers(PERIODS[0], PERIODS[1] + 1, size=(count, 1))
    nonsense, content = lexicon.encode(NONSENSE), lexicon.encode(lexicon.content)
    shape = (count, PERIODS[1])
    words = np.where(rng.random((count, 1)) < 0.3, _choose(rng, nonsense, *shape), _choose(rng, content, *shape))
    place = np.arange(INDUCTION_LENGTH)[None]
    tokens, answers = _assemble(count, lexicon, np.take_along_axis(words, place % period, axis=1))
    # Where the first repeat begins cannot be known; from its second word on all can be copied.
    answers[:, 1:] = place > period
    return Documents(tokens, answers, {"period": period[:, 0]})


def _reverse_recall(count: int, rng: Generator, lexicon: Lexicon, split: Split) -> Documents:
    """2 to 6 pairs `value key ,` of different words, then `?` and 8 queries `key value`: the value stands before."""
    num_pairs = rng.integers(2, 7, size=count)
    content = lexicon.encode(lexicon.content)
    words = content[distinct(rng, count, len(content), 12)].reshape(count, 6, 2)
    pairs = np.concatenate([words, _repeat(lexicon, ",", count, 6)], axis=2)
    pairs = _only(np.arange(6) < num_pairs[:, None], pairs)
    asked = rng.integers(num_pairs[:, None], size=(count, NUM_QUERIES))
    queries = np.take_along_axis(words, asked[:, :, None], axis=1)[:, :, ::-1]
    tokens, answers = _assemble(count, lexicon, pairs, "?", queries)
    answers[:, -2 * NUM_QUERIES + 1 :: 2] = True
    return Documents(tokens, answers, {"pairs": num_pairs})


# ----------------------------------------------------------------------------------------------------------- retrieval


def _fillers(count: int, length: int, rng: Generator, lexicon: Lexicon) -> Tokens:
    """Filler words [count, length] of a first-order Markov chain with four successors a word."""
    successors, first = lexicon.filler_successors, int(lexicon.encode(FILLERS[:1])[0])
    bounds = np.cumsum(SUCCESSOR_PROBABILITIES)[:-1]
    choices = np.searchsorted(bounds, rng.random((length, count)), side="right")
    words = np.empty((length, count), dtype=np.int32)
    words[0] = first + rng.integers(len(FILLERS), size=count)
    for step in range(1, length):
        words[step] = successors[words[step - 1] - first, choices[step]]
    return words.T


def _filler(count: int, rng: Generator, lexicon: Lexicon, split: Split) -> Documents:
    """Nothing but filler words."""
    return Documents(*_assemble(count, lexicon, _fillers(count, FILLER_LENGTH, rng, lexicon)))


def _sentences(present: NDArray[np.bool_], rng: Generator, lexicon: Lexicon) -> Tokens:
    """Filler sentences [N, S, W] of 4 to 8 words and a full stop, where `present` [N, S]."""
    shape, longest = present.shape, SENTENCE_LENGTHS[1]
    words = _fillers(present.size, longest, rng, lexicon).reshape(*shape, longest)
    length = rng.integers(SENTENCE_LENGTHS[0], longest + 1, size=(*shape, 1))
    words = np.where(np.arange(longest) < length, words, ABSENT)
    return _only(present, np.concatenate([words, _repeat(lexicon, ".", *shape)], axis=2))


def _haystack(
    count: int, rng: Generator, lexicon: Lexicon, sentences: tuple[int, int]
) -> tuple[Tokens, Tokens, Tokens, dict[str, Integers]]:
    """Facts among filler sentences, the name and the code of the first fact, and details.

    `depth` is the percentage of sentences before the fact that is asked for.
    """
    num_facts = rng.integers(1, MAX_FACTS + 1, size=count)
    num_sentences = rng.integers(sentences[0], sentences[1] + 1, size=count)
    has_fact = np.arange(MAX_FACTS) < num_facts[:, None]
    has_sentence = np.arange(sentences[1]) < num_sentences[:, None]
    present = np.concatenate([has_fact, has_sentence], axis=1)
    names = lexicon.encode(lexicon.names)[distinct(rng, count, len(lexicon.names), MAX_FACTS)]
    # All code words of a document differ, so that what was copied also says from where.
    codes = lexicon.encode(CODES)[distinct(rng, count, len(CODES), MAX_FACTS * CODE_LENGTH)]
    codes = codes.reshape(count, MAX_FACTS, CODE_LENGTH)
    frame, stop = _repeat(lexicon, "The code of", count, MAX_FACTS), _repeat(lexicon, ".", count, MAX_FACTS)
    facts = _only(has_fact, np.concatenate([frame, names[:, :, None], codes, stop], axis=2))
    filler = _sentences(has_sentence, rng, lexicon)
    # As wide as the longest sentence, which is longer than a fact.
    segments = np.full((*present.shape, filler.shape[2]), ABSENT, dtype=np.int32)
    segments[:, :MAX_FACTS, : facts.shape[2]] = facts
    segments[:, MAX_FACTS:] = filler
    shuffled, places = _at_random(rng, segments)
    before = (present & (places < places[:, :1])).sum(axis=1)
    depth = 100 * before // np.maximum(present.sum(axis=1) - 1, 1)
    details = {"facts": num_facts, "sentences": num_sentences, "depth": depth}
    return shuffled.reshape(count, -1), names[:, 0], codes[:, 0], details


def _needle_in(sentences: tuple[int, int]) -> Kind:
    """1 to 3 facts `The code of NAME c c c .` among filler sentences; then one of them is asked for."""

    def needle(count: int, rng: Generator, lexicon: Lexicon, split: Split) -> Documents:
        context, name, code, details = _haystack(count, rng, lexicon, sentences)
        parts = _assemble(count, lexicon, context, "What is the code of", name, _Answer(code), ".")
        return Documents(*parts, details)

    return needle


def _needle_chat(count: int, rng: Generator, lexicon: Lexicon, split: Split) -> Documents:
    """As `needle`, the question in other words, or before the facts with the name repeated where the answer begins."""
    context, name, code, details = _haystack(count, rng, lexicon, (0, 5))
    first = rng.random((count, 1)) < 0.5
    ask = np.concatenate([_repeat(lexicon, "Ask :", count), name[:, None], _repeat(lexicon, "?", count)], axis=1)
    # Both closings in the same columns: the shorter one begins with absent tokens.
    after, answer = _repeat(lexicon, "Tell me the code for", count), _repeat(lexicon, "Answer for", count)
    closing = np.where(first, np.pad(answer, ((0, 0), (3, 0)), constant_values=ABSENT), after)
    parts = _assemble(count, lexicon, _only(first[:, 0], ask), context, closing, name, _Answer(code), ".")
    return Documents(*parts, details | {"question_first": first[:, 0].astype(np.int64)})


# ---------------------------------------------------------------------------------------------- tasks of circuit papers


def _indirect_object(count: int, rng: Generator, lexicon: Lexicon, split: Split) -> Documents:
    """Two names, one of them again, and the other is due: 15 templates with either name first.

    Wang et al., "Interpretability in the Wild" (2022).
    """
    subject, indirect = _draw_until(
        lambda n: distinct(rng, n, len(lexicon.names), 2),
        lambda pairs: held_out(*pairs.T) == (split == "test"),
        count,
    ).T
    names = lexicon.encode(lexicon.names)
    filled = {
        "[B]": names[subject],
        "[A]": names[indirect],
        "[PLACE]": _choose(rng, lexicon.encode(lexicon.places), count),
        "[OBJECT]": _choose(rng, lexicon.encode(lexicon.gifts), count),
    }
    templates = _template_table(lexicon, tuple(filled))
    which = rng.integers(len(templates), size=count)
    tokens = templates[which]
    for index, words in enumerate(filled.values()):
        tokens = np.where(tokens == -2 - index, words[:, None], tokens)
    parts = _assemble(count, lexicon, tokens, _Answer(filled["[A]"]), ".")
    return Documents(*parts, {"subject": filled["[B]"], "indirect_object": filled["[A]"], "template": which})


def _template_table(lexicon: Lexicon, slots: Sequence[str]) -> Tokens:
    """All templates, then all with the first two names changed over: [30, longest], the n-th slot as -2 - n."""
    rows = []
    for template in lexicon.ioi_templates:
        words = template.split()
        first, second = words.index("[B]"), words.index("[A]")
        swapped = list(words)
        swapped[first], swapped[second] = "[A]", "[B]"
        rows += [words, swapped]
    table = np.full((len(rows), max(map(len, rows))), ABSENT, dtype=np.int32)
    for row, words in zip(table, rows[::2] + rows[1::2], strict=True):
        row[: len(words)] = [-2 - slots.index(w) if w in slots else lexicon.number[w] for w in words]
    return table


def _colored_objects(official: bool) -> Kind:
    """A scene of three objects and their colors; then the capitalized color of one of them is asked for.

    In the order of nouns and colors that puts a key right before its value (`mug yellow … mug Yellow`), one or two
    scenes; in the `official` one (`yellow mug … mug ? A : Yellow`) always two. Scenes of a document share nothing, and
    each has one question, lest elimination take the place of looking up.
    Merullo et al., "Circuit Component Reuse Across Tasks" (2023), section 3.2.
    """

    def colored_objects(count: int, rng: Generator, lexicon: Lexicon, split: Split) -> Documents:
        num_objects = 2 * NUM_SCENE_OBJECTS
        sizes = (len(lexicon.things), len(lexicon.colors))
        # The objects of the two scenes, which are asked for in the first and the last place of these.
        asked = np.array([0, NUM_SCENE_OBJECTS])

        def draw(n: int) -> Integers:
            return np.stack([distinct(rng, n, size, num_objects) for size in sizes], axis=1)

        def accept(pairs: Integers) -> NDArray[np.bool_]:
            out = held_out(pairs[:, 0], pairs[:, 1])
            return out[:, asked].all(axis=1) if split == "test" else ~out.any(axis=1)

        pairs = _draw_until(draw, accept, count)
        things, colors = lexicon.encode(lexicon.things), lexicon.encode(lexicon.colors)
        capitals = lexicon.encode([color.capitalize() for color in lexicon.colors])
        parts: list[str | NDArray | _Answer] = []
        has_first = np.ones(count, dtype=bool) if official else rng.random(count) < 0.5
        for scene, present in enumerate((has_first, np.ones(count, dtype=bool))):
            members = pairs[:, :, scene * NUM_SCENE_OBJECTS : (scene + 1) * NUM_SCENE_OBJECTS]
            thing, color = things[members[:, 0]], colors[members[:, 1]]
            question = [*_scene(count, rng, lexicon, thing, color, official), "What color is the", thing[:, 0]]
            question += ["? A :"] if official else []
            tokens, _ = _assemble(count, lexicon, *question)
            parts += [_only(present, tokens[:, 1:]), _Answer(_only(present, capitals[members[:, 1, 0]]))]
            parts += [] if official else [_only(present, _repeat(lexicon, ".", count))]
        listed = capitals[pairs[:, 1]].reshape(count, 2, NUM_SCENE_OBJECTS)
        return Documents(*_assemble(count, lexicon, *parts), {"scenes": 1 + has_first, "listed": listed[:, 1]})

    return colored_objects


def _scene(
    count: int, rng: Generator, lexicon: Lexicon, things: Tokens, colors: Tokens, official: bool
) -> list[str | NDArray]:
    """`Q : On the table , I see a mug yellow , a leash blue , and a bowl red .` with the objects in random order."""
    pairs = np.stack([colors, things] if official else [things, colors], axis=2)
    pairs, _ = _at_random(rng, pairs)
    vowels = lexicon.encode([word for word in lexicon.vocabulary if word[0] in "aeiou"])
    articles = np.where(np.isin(pairs[:, :, 0], vowels), lexicon.number["an"], lexicon.number["a"])
    first, second, third = np.concatenate([articles[:, :, None], pairs], axis=2).swapaxes(0, 1)
    subjects = np.full((len(lexicon.subjects), max(len(s.split()) for s in lexicon.subjects)), ABSENT, dtype=np.int32)
    for row, subject in zip(subjects, lexicon.subjects, strict=True):
        row[: len(subject.split())] = lexicon.encode(subject)
    surface, subject = _choose(rng, lexicon.encode(lexicon.surfaces), count), _choose(rng, subjects, count)
    return ["Q : On the", surface, ",", subject, first, ",", second, ", and", third, "."]


def _greater_than(count: int, rng: Generator, lexicon: Lexicon, split: Split) -> Documents:
    """`The NOUN lasted from the year CC YY to the year CC ZZ .` with ZZ uniform above YY.

    Hanna et al., "How does GPT-2 compute greater-than?" (2023).
    """
    nouns = np.arange(len(lexicon.durations))
    nouns = lexicon.encode(lexicon.durations)[held_out(nouns) == (split == "test")]
    begin = rng.integers(len(YEARS) - 1, size=count)
    end = rng.integers(begin + 1, len(YEARS))
    years, century = lexicon.encode(YEARS), _choose(rng, lexicon.encode(CENTURIES), count)
    start = ("The", _choose(rng, nouns, count), "lasted from the year", century, years[begin])
    parts = _assemble(count, lexicon, *start, "to the year", century, _Answer(years[end]), ".")
    return Documents(*parts, {"begin": begin})


def _docstring(count: int, rng: Generator, lexicon: Lexicon, split: Split) -> Documents:
    """A function of six arguments, of which the docstring describes three in order; the third is due.

    Which three, and how long descriptions are, differs, so that no fixed distance leads to the answer.
    Heimersheim and Janiak, "A circuit for Python docstrings in a 4-layer attention-only transformer" (2023).
    """
    words = lexicon.encode(lexicon.arguments)[distinct(rng, count, len(lexicon.arguments), NUM_ARGUMENTS + 1)]
    method, arguments = words[:, :1], words[:, 1:]
    first = rng.integers(NUM_ARGUMENTS - 2, size=count)
    described = [np.take_along_axis(arguments, (first + k)[:, None], axis=1) for k in range(3)]
    vocabulary = lexicon.encode(lexicon.descriptions)

    def describe(longest: int) -> Tokens:
        length = rng.integers(1, longest + 1, size=(count, 1))
        return np.where(np.arange(longest) < length, _choose(rng, vocabulary, count, longest), ABSENT)

    parts: list[str | NDArray | _Answer] = ["def", method, "( self"]
    for argument in arguments.T:
        parts += [",", argument]
    parts += [') : """', describe(3), ":param", described[0], describe(2), ":param", described[1], describe(2)]
    parts += [":param", _Answer(described[2]), describe(2), '"""']
    return Documents(*_assemble(count, lexicon, *parts), {"first": first})


# ---------------------------------------------------------------------------------------------------- options, numbers


def _multiple_choice(labels: Literal["standard", "ordered", "random", "numbers", "mixed"]) -> Kind:
    """`What is X ? ( A ) w ( B ) w ( C ) w ( D ) w Answer : ( LABEL )`, X one of the four words: text to label.

    `mixed` has A to D in 70 % of documents, and 10 % each of other letters in a row, any letters, and the numbers 1 to
    4. Lieberum et al., "Does Circuit Analysis Interpretability Scale?" (2023).
    """

    def multiple_choice(count: int, rng: Generator, lexicon: Lexicon, split: Split) -> Documents:
        categories = (lexicon.names, lexicon.colors, (*lexicon.things, *lexicon.gifts))
        sizes = np.array([len(set(words)) for words in categories])
        table = np.full((len(categories), sizes.max()), ABSENT, dtype=np.int32)
        for row, words in zip(table, categories, strict=True):
            row[: len(set(words))] = lexicon.encode(sorted(set(words)))

        def draw(n: int) -> Integers:
            chosen = rng.integers(len(categories), size=n)
            return np.concatenate([chosen[:, None], distinct(rng, n, sizes[chosen], NUM_OPTIONS)], axis=1)

        drawn = _draw_until(draw, lambda rows: held_out(*rows[:, 1:].T) == (split == "test"), count)
        category, options = drawn[:, :1], table[drawn[:, :1], drawn[:, 1:]]
        right = rng.integers(NUM_OPTIONS, size=(count, 1))
        symbols = _labels(labels, count, rng, lexicon)
        parts: list[str | NDArray | _Answer] = ["What is", np.take_along_axis(options, right, axis=1), "?"]
        for label, option in zip(symbols.T, options.T, strict=True):
            parts += ["(", label, ")", option]
        parts += ["Answer : (", _Answer(np.take_along_axis(symbols, right, axis=1)), ")"]
        return Documents(
            *_assemble(count, lexicon, *parts), {"category": category[:, 0], "right": right[:, 0], "labels": symbols}
        )

    return multiple_choice


def _labels(kind: str, count: int, rng: Generator, lexicon: Lexicon) -> Tokens:
    """Labels of four options, [count, 4]."""
    letters = lexicon.encode(LABELS)
    in_a_row = letters[rng.integers(1, len(letters) - NUM_OPTIONS + 1, size=(count, 1)) + np.arange(NUM_OPTIONS)]
    sets = {
        "standard": np.broadcast_to(letters[:NUM_OPTIONS], (count, NUM_OPTIONS)),
        "ordered": in_a_row,
        "random": letters[distinct(rng, count, len(letters), NUM_OPTIONS)],
        "numbers": np.broadcast_to(lexicon.encode(DIGITS[1 : NUM_OPTIONS + 1]), (count, NUM_OPTIONS)),
    }
    if kind != "mixed":
        return sets[kind]
    which = rng.choice(len(sets), size=(count, 1), p=(0.7, 0.1, 0.1, 0.1))
    return np.select([which == index for index in range(len(sets))], list(sets.values()))


def _sum(count: int, rng: Generator, lexicon: Lexicon, split: Split) -> Documents:
    """`3 + 5 + 9 = 7`: sums of 2 to 6 digits modulo 10, more of the short ones.

    Half of the terms are 0 in training. Of digits drawn evenly, one term alone says nothing about the sum, so that no
    gradient leads to attending to it: sums of two were not learned in 3,000 steps. Tests draw all digits evenly.
    """
    terms = rng.choice(np.arange(2, MAX_TERMS + 1), size=count, p=np.array(TERM_SHARES) / sum(TERM_SHARES))
    present = np.arange(MAX_TERMS) < terms[:, None]
    if split == "train":
        drawn = present & (rng.random(present.shape) < 0.5)
    else:
        drawn = present
    values = np.where(drawn, rng.integers(10, size=(count, MAX_TERMS)), 0)
    digits = lexicon.encode(DIGITS)
    plus = np.where(np.arange(MAX_TERMS) > 0, lexicon.number["+"], ABSENT)
    tokens = _only(present, np.stack([np.broadcast_to(plus, values.shape), digits[values]], axis=2))
    parts = _assemble(count, lexicon, tokens, "=", _Answer(digits[values.sum(axis=1) % 10]))
    return Documents(*parts, {"terms": terms})


def _boolean(count: int, rng: Generator, lexicon: Lexicon, split: Split) -> Documents:
    """`( ( True and not False ) or True ) = True`: brackets to the left, 1 to 4 deep, more of the shallow ones."""
    depth = rng.choice(np.arange(1, MAX_DEPTH + 1), size=count, p=np.arange(MAX_DEPTH, 0, -1) / 10)
    truth = rng.random((count, MAX_DEPTH + 1)) < 0.5
    negated = rng.random(truth.shape) < 0.3
    either = rng.random(truth.shape) < 0.5
    constants = lexicon.encode("False True")
    number, value = lexicon.number, truth[:, 0] ^ negated[:, 0]
    opening = np.where(np.arange(MAX_DEPTH) < depth[:, None], number["("], ABSENT)
    parts = [opening, np.where(negated[:, 0], number["not"], ABSENT), constants[truth[:, 0].astype(int)]]
    for level in range(1, MAX_DEPTH + 1):
        present, operand = depth >= level, truth[:, level] ^ negated[:, level]
        value = np.where(present, np.where(either[:, level], value | operand, value & operand), value)
        step = [
            np.where(either[:, level], number["or"], number["and"]),
            np.where(negated[:, level], number["not"], ABSENT),
            constants[truth[:, level].astype(int)],
            np.full(count, number[")"]),
        ]
        parts.append(_only(present, np.stack(step, axis=1)))
    return Documents(*_assemble(count, lexicon, *parts, "=", _Answer(constants[value.astype(int)])), {"depth": depth})


def _lookup(count: int, rng: Generator, lexicon: Lexicon, split: Split) -> Documents:
    """`( A ) 4 ( B ) 7 ( C ) 2 ( D ) 9 Answer : 2 = C`: the label of one of four different digits."""
    digits, letters = lexicon.encode(DIGITS), lexicon.encode(LABELS)
    values = digits[distinct(rng, count, len(digits), NUM_OPTIONS)]
    right = rng.integers(NUM_OPTIONS, size=(count, 1))
    parts: list[str | NDArray | _Answer] = []
    for label, value in zip(LABELS, values.T, strict=False):
        parts += [f"( {label} )", value]
    parts += ["Answer :", np.take_along_axis(values, right, axis=1), "=", _Answer(letters[right])]
    return Documents(*_assemble(count, lexicon, *parts), {"right": right[:, 0]})


Kind = Callable[[int, Generator, Lexicon, Split], Documents]

KINDS: dict[str, Kind] = {
    "ind": _induction,
    "vk": _reverse_recall,
    "needle": _needle_in((0, 5)),
    "needle_long": _needle_in((20, 45)),
    "needle_chat": _needle_chat,
    "ioi": _indirect_object,
    "co": _colored_objects(official=False),
    "co_official": _colored_objects(official=True),
    "gt": _greater_than,
    "doc": _docstring,
    "mcq": _multiple_choice("standard"),
    "mcq_ordered": _multiple_choice("ordered"),
    "mcq_random": _multiple_choice("random"),
    "mcq_numbers": _multiple_choice("numbers"),
    "mcq_mixed": _multiple_choice("mixed"),
    "filler": _filler,
    "sum": _sum,
    "boolean": _boolean,
    "lookup": _lookup,
}
