"""Documents of the house language models: structure, answers that follow, combinations held out, packing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from shared.config import UserError
from shared.data import house_lexicon
from shared.data.house_corpora import (
    ABSENT,
    KINDS,
    Documents,
    distinct,
    generate,
    held_out,
    make_stream,
    mix,
    pack,
)
from shared.data.house_lexicon import BOS, CODES, LABELS, NONSENSE, Lexicon, load_lexicon

COUNT = 300
SKILLS = {"ind": 1, "ioi": 1, "co": 1, "needle": 1, "mcq": 2, "gt": 1, "doc": 1}


@pytest.fixture(scope="module")
def lexicon() -> Lexicon:
    return load_lexicon("embedded")


def draw(kind: str, lexicon: Lexicon, split: str = "train", count: int = COUNT) -> Documents:
    return generate(kind, count, make_stream(7, split, kind), lexicon, split).compact()


def texts(documents: Documents, lexicon: Lexicon) -> list[list[str]]:
    return [lexicon.decode(row).split() for row in documents.tokens]


def answers(documents: Documents, lexicon: Lexicon) -> list[list[str]]:
    rows = zip(documents.tokens, documents.answers, strict=True)
    return [lexicon.decode(tokens[marks]).split() for tokens, marks in rows]


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_begins_once_and_stays_in_the_vocabulary(kind: str, split: str, lexicon: Lexicon) -> None:
    documents = draw(kind, lexicon, split)
    bos = lexicon.number[BOS]
    assert (documents.tokens[:, 0] == bos).all()
    assert ((documents.tokens == bos).sum(axis=1) == 1).all()
    assert documents.tokens.min() >= ABSENT
    assert documents.tokens.max() < len(lexicon.vocabulary)
    # Absent tokens only at the end, answers only where there are tokens.
    present = documents.tokens != ABSENT
    assert (np.diff(present.astype(int), axis=1) <= 0).all()
    assert not (documents.answers & ~present).any()
    assert documents.answers.any(axis=1).all() == (kind != "filler")
    again = draw(kind, lexicon, split)
    np.testing.assert_array_equal(documents.tokens, again.tokens)


def test_induction_answers_are_what_stood_a_period_before(lexicon: Lexicon) -> None:
    documents = draw("ind", lexicon)
    for words, marks, period in zip(
        texts(documents, lexicon), documents.answers, documents.details["period"], strict=True
    ):
        assert 3 <= period <= 20
        sequence = words[1:]
        assert len(sequence) == 60
        assert all(a == b for a, b in zip(sequence, sequence[period:], strict=False))
        # From the second word of the first repeat on.
        assert marks.nonzero()[0].tolist() == list(range(period + 2, 61))
    share = np.mean([words[1] in NONSENSE for words in texts(documents, lexicon)])
    assert 0.2 < share < 0.4


def test_reverse_recall_asks_for_the_word_before_the_key(lexicon: Lexicon) -> None:
    documents = draw("vk", lexicon)
    for words, expected in zip(texts(documents, lexicon), answers(documents, lexicon), strict=True):
        end = words.index("?")
        pairs = words[1:end]
        assert pairs[2::3] == [","] * (end // 3)
        memory = dict(zip(pairs[1::3], pairs[0::3], strict=True))
        assert 2 <= len(memory) <= 6
        assert len({*memory, *memory.values()}) == 2 * len(memory)
        queries = words[end + 1 :]
        assert len(queries) == 16
        assert queries[1::2] == expected == [memory[key] for key in queries[0::2]]


@pytest.mark.parametrize("kind", ["needle", "needle_long", "needle_chat"])
def test_a_needle_is_found_once_and_says_its_code(kind: str, lexicon: Lexicon) -> None:
    documents = draw(kind, lexicon)
    facts_seen, depths = set(), documents.details["depth"]
    for words, code, facts in zip(
        texts(documents, lexicon), answers(documents, lexicon), documents.details["facts"], strict=True
    ):
        places = [i for i in range(len(words) - 2) if words[i : i + 3] == ["The", "code", "of"]]
        memory = {words[i + 3]: words[i + 4 : i + 7] for i in places}
        assert len(memory) == len(places) == facts
        asked = words[-5]
        assert asked in lexicon.names
        assert words[-4:] == [*code, "."]
        assert memory[asked] == code
        used = [word for word in words[:-4] if word in CODES]
        assert len(used) == len(set(used)) == 3 * facts
        facts_seen.add(int(facts))
    assert facts_seen == {1, 2, 3}
    assert depths.min() == 0
    assert depths.max() == 100
    if kind == "needle_long":
        assert 150 < documents.tokens.shape[1] <= 512
    if kind == "needle_chat":
        first = np.array([words[1] == "Ask" for words in texts(documents, lexicon)])
        np.testing.assert_array_equal(first, documents.details["question_first"] == 1)


def test_depth_is_zero_where_the_needle_comes_first(lexicon: Lexicon) -> None:
    documents = draw("needle", lexicon)
    for words, depth, facts in zip(
        texts(documents, lexicon), documents.details["depth"], documents.details["facts"], strict=True
    ):
        if facts == 1:
            assert (words[1:4] == ["The", "code", "of"]) == (depth == 0)


def test_the_indirect_object_is_the_name_that_stands_once(lexicon: Lexicon) -> None:
    documents = draw("ioi", lexicon)
    for words, (answer,) in zip(texts(documents, lexicon), answers(documents, lexicon), strict=True):
        before = words[:-2]
        named = [word for word in before if word in lexicon.names]
        assert sorted(map(named.count, set(named))) == [1, 2]
        assert named.count(answer) == 1
        assert words[-2:] == [answer, "."]
        assert not any(word.startswith("[") for word in words)
    assert len(set(documents.details["template"].tolist())) == 30


def test_both_orders_of_the_names_occur(lexicon: Lexicon) -> None:
    documents = draw("ioi", lexicon)
    first = [next(word for word in words if word in lexicon.names) for words in texts(documents, lexicon)]
    subjects = [lexicon.vocabulary[token] for token in documents.details["subject"]]
    assert 0.35 < np.mean([name == subject for name, subject in zip(first, subjects, strict=True)]) < 0.65


@pytest.mark.parametrize("kind", ["co", "co_official"])
def test_the_color_asked_for_is_that_of_the_object(kind: str, lexicon: Lexicon) -> None:
    documents = draw(kind, lexicon)
    for words, colors in zip(texts(documents, lexicon), answers(documents, lexicon), strict=True):
        text = " ".join(words[1:])
        scenes = text.split("Q : ")[1:]
        assert len(scenes) == len(colors)
        seen: list[str] = []
        for scene, color in zip(scenes, colors, strict=True):
            told, question = scene.split(" . ", 1)
            told_words = told.split()
            pairs = {}
            for place, word in enumerate(told_words):
                if word in ("a", "an"):
                    one, two = told_words[place + 1 : place + 3]
                    assert (word == "an") == (one[0] in "aeiou")
                    thing, shade = (two, one) if kind == "co_official" else (one, two)
                    pairs[thing] = shade
            assert len(pairs) == len(set(pairs.values())) == 3
            asked = question.split()[question.split().index("the") + 1]
            assert pairs[asked].capitalize() == color
            seen += [*pairs, *pairs.values()]
        assert len(seen) == len(set(seen)), "scenes share nothing"
        if kind == "co":
            assert text.endswith(f"{colors[-1]} .")
        else:
            assert text.endswith(f"? A : {colors[-1]}")
            assert len(scenes) == 2


def test_years_rise(lexicon: Lexicon) -> None:
    for words in texts(draw("gt", lexicon), lexicon):
        assert words[3:7] == "lasted from the year".split()  # noqa: SIM905
        assert words[7] == words[12]
        assert int(words[8]) < int(words[13])


def test_the_docstring_goes_on_with_the_next_argument(lexicon: Lexicon) -> None:
    documents = draw("doc", lexicon)
    distances = set()
    for words, (answer,) in zip(texts(documents, lexicon), answers(documents, lexicon), strict=True):
        arguments = words[words.index("self") + 2 : words.index(")") : 2]
        described = [words[i + 1] for i, word in enumerate(words) if word == ":param"]
        assert len(set(arguments)) == 6
        first = arguments.index(described[0])
        assert described == arguments[first : first + 3]
        assert described[-1] == answer
        last = len(words) - 1 - words[::-1].index(answer)
        distances.add(last - words.index(answer))
    assert len(distances) > 5, "a fixed distance would lead to the answer"


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.startswith("mcq")])
def test_the_label_is_that_of_the_word_asked_for(kind: str, lexicon: Lexicon) -> None:
    documents = draw(kind, lexicon)
    label_sets = set()
    for words, (answer,) in zip(texts(documents, lexicon), answers(documents, lexicon), strict=True):
        options = words[5 : words.index("Answer")]
        labels, values = options[1::4], options[3::4]
        assert len(set(labels)) == len(set(values)) == 4
        assert dict(zip(values, labels, strict=True))[words[3]] == answer
        assert words[-2:] == [answer, ")"]
        label_sets.add(tuple(labels))
    if kind == "mcq":
        assert label_sets == {tuple("ABCD")}
    elif kind == "mcq_numbers":
        assert label_sets == {tuple("1234")}
    else:
        assert len(label_sets) > 10
    if kind == "mcq_ordered":
        assert all("".join(labels) in "".join(LABELS[1:]) for labels in label_sets)


def test_sums_are_right_and_mostly_short(lexicon: Lexicon) -> None:
    documents = draw("sum", lexicon, count=3000)
    for words, terms in zip(texts(documents, lexicon), documents.details["terms"], strict=True):
        numbers = [int(word) for word in words[1:-2:2]]
        assert len(numbers) == terms
        assert int(words[-1]) == sum(numbers) % 10
    shares = np.bincount(documents.details["terms"])[2:] / len(documents)
    np.testing.assert_allclose(shares, np.array([5, 4, 3, 2, 1]) / 15, atol=0.04)


@pytest.mark.parametrize(("split", "zeros"), [("train", 0.55), ("test", 0.1)])
def test_one_term_of_a_sum_says_something_in_training_alone(lexicon: Lexicon, split: str, zeros: float) -> None:
    # 3 + 0 = 3 more often than not: half of the terms are 0 there, beside those that are drawn as 0.
    documents = generate("sum", 3000, make_stream(0, split), lexicon, split)
    terms = [word for words in texts(documents, lexicon) for word in words[1:-2:2]]
    assert np.mean([term == "0" for term in terms]) == pytest.approx(zeros, abs=0.02)


def truth(words: list[str]) -> bool:
    """A recursive reader of what the generator makes by columns."""

    def operand(place: int) -> tuple[bool, int]:
        if words[place] == "not":
            value, place = operand(place + 1)
            return not value, place
        if words[place] != "(":
            return words[place] == "True", place + 1
        value, place = operand(place + 1)
        while words[place] != ")":
            operator = words[place]
            other, place = operand(place + 1)
            value = (value and other) if operator == "and" else (value or other)
        return value, place + 1

    value, end = operand(0)
    assert end == len(words)
    return value


def test_boolean_expressions_are_what_they_say(lexicon: Lexicon) -> None:
    assert truth("( ( not True or True ) and not False )".split())  # noqa: SIM905
    documents = draw("boolean", lexicon)
    for words, depth in zip(texts(documents, lexicon), documents.details["depth"], strict=True):
        assert truth(words[1:-2]) == (words[-1] == "True")
        assert words.count("(") == depth


def test_lookup_finds_the_label(lexicon: Lexicon) -> None:
    for words in texts(draw("lookup", lexicon), lexicon):
        assert dict(zip(words[4:17:4], words[2:17:4], strict=True))[words[-3]] == words[-1]


def test_filler_words_follow_the_chain(lexicon: Lexicon) -> None:
    words = draw("filler", lexicon).tokens[:, 1:]
    first = lexicon.number["f0"]
    successors = lexicon.filler_successors
    assert all(len(set(row)) == 4 for row in successors.tolist())
    ranks = (successors[words[:, :-1] - first] == words[:, 1:, None]).argmax(axis=2)
    assert (
        np.take_along_axis(successors[words[:, :-1] - first], ranks[..., None], axis=2)[..., 0] == words[:, 1:]
    ).all()
    np.testing.assert_allclose(np.bincount(ranks.ravel()) / ranks.size, [0.5, 0.25, 0.15, 0.1], atol=0.02)


# -------------------------------------------------------------------------------------------------- what is held out


def indices(words: list[str], known: tuple[str, ...]) -> np.ndarray:
    return np.array([known.index(word) for word in words])


def pairs_of_names(documents: Documents, lexicon: Lexicon) -> np.ndarray:
    number = {lexicon.number[name]: i for i, name in enumerate(lexicon.names)}
    roles = (documents.details["subject"], documents.details["indirect_object"])
    return np.array([[number[token] for token in role.tolist()] for role in roles])


def test_held_out_pairs_of_names_are_never_trained_on(lexicon: Lexicon) -> None:
    assert not held_out(*pairs_of_names(draw("ioi", lexicon, "train", 5000), lexicon)).any()
    assert held_out(*pairs_of_names(draw("ioi", lexicon, "test"), lexicon)).all()
    both = np.indices((len(lexicon.names),) * 2)
    assert 0.19 < held_out(*both).mean() < 0.21
    np.testing.assert_array_equal(held_out(*both), held_out(*both).T)


@pytest.mark.parametrize("kind", ["co", "co_official"])
def test_held_out_objects_and_colors_are_never_trained_on(kind: str, lexicon: Lexicon) -> None:
    def out(split: str, only_asked: bool) -> list[bool]:
        found = []
        for words in texts(draw(kind, lexicon, split, 1000), lexicon):
            asked = [words[i + 2] for i, word in enumerate(words[:-2]) if words[i : i + 2] == ["is", "the"]]
            for i, word in enumerate(words[:-2]):
                if word in ("a", "an"):
                    thing, color = (words[i + 1 : i + 3])[:: -1 if kind == "co_official" else 1]
                    if not only_asked or thing in asked:
                        found.append(
                            bool(held_out(indices([thing], lexicon.things), indices([color], lexicon.colors))[0])
                        )
        return found

    assert not any(out("train", only_asked=False))
    assert all(out("test", only_asked=True))


def test_held_out_nouns_are_never_trained_on(lexicon: Lexicon) -> None:
    train, test = (
        {words[2] for words in texts(draw("gt", lexicon, split, 3000), lexicon)} for split in ("train", "test")
    )
    assert not train & test
    assert train | test == set(lexicon.durations)
    assert len(test) == len(lexicon.durations) // 5


def test_held_out_options_are_never_trained_on(lexicon: Lexicon) -> None:
    def options(split: str) -> set[frozenset[str]]:
        rows = texts(draw("mcq", lexicon, split, 3000), lexicon)
        return {frozenset(words[5 : words.index("Answer")][3::4]) for words in rows}

    train, test = options("train"), options("test")
    assert len([choice for choice in train if choice <= set(lexicon.colors)]) > 40
    assert not train & test


# ------------------------------------------------------------------------------------------------- mixing and packing


def test_streams_differ_by_seed_split_and_name(lexicon: Lexicon) -> None:
    streams = [make_stream(0, "train", "a"), make_stream(1, "train", "a"), make_stream(0, "test", "a")]
    streams += [make_stream(0, "train", "b"), make_stream(0, "train", "a", 1)]
    assert len({stream.integers(2**62) for stream in streams}) == len(streams)
    assert make_stream(0, "train", "a", 1).integers(2**62) == make_stream(0, "train", "a", 1).integers(2**62)


def test_a_mixture_has_its_weights_in_random_order(lexicon: Lexicon) -> None:
    tokens = mix({"gt": 3, "lookup": 1, "sum": 0}, 2000, make_stream(0, "train"), lexicon)
    starts = (tokens == lexicon.number[BOS]).nonzero()[0]
    assert len(starts) == 2000
    assert tokens[0] == lexicon.number[BOS]
    is_year = tokens[starts + 1] == lexicon.number["The"]
    assert 0.7 < is_year.mean() < 0.8
    assert np.abs(np.diff(is_year.astype(int))).sum() > 300, "kinds alternate"


def test_packing_leaves_out_nothing(lexicon: Lexicon) -> None:
    windows = pack(SKILLS, 40, 96, make_stream(3, "train"), lexicon)
    assert windows.shape == (40, 97)
    assert windows.min() >= 0
    # The same documents end to end, none cut out between two windows.
    needed = windows.size
    stream = mix(SKILLS, needed // 40 + 16, make_stream(3, "train"), lexicon)
    shared = min(len(stream), needed)
    np.testing.assert_array_equal(windows.ravel()[:shared], stream[:shared])
    np.testing.assert_array_equal(windows, pack(SKILLS, 40, 96, make_stream(3, "train"), lexicon))


def test_distinct_numbers_are_uniform() -> None:
    rng = np.random.default_rng(0)
    picks = distinct(rng, 24_000, 4, 3)
    assert all(len(set(row)) == 3 for row in picks[:200].tolist())
    _, counts = np.unique(picks, axis=0, return_counts=True)
    assert len(counts) == 24  # 4 · 3 · 2 orders, a thousand times each
    assert counts.min() > 850
    assert counts.max() < 1150
    sizes = np.array([3, 50] * 100)
    assert (distinct(rng, 200, sizes, 3) < sizes[:, None]).all()


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda lexicon: generate("nedle", 1, make_stream(0, "train"), lexicon), "did you mean 'needle'"),
        (lambda lexicon: generate("ind", 0, make_stream(0, "train"), lexicon), "at least one document"),
        (lambda lexicon: generate("ind", 1, make_stream(0, "train"), lexicon, "dev"), "choose train or test"),  # type: ignore[arg-type]
        (lambda lexicon: mix({"ind": -1, "vk": 2}, 1, make_stream(0, "train"), lexicon), "must not be negative"),
        (lambda lexicon: mix({}, 1, make_stream(0, "train"), lexicon), "must be positive|must not be negative"),
        (lambda lexicon: lexicon.encode("The xylophone"), "xylophone"),
        (lambda lexicon: load_lexicon("other"), "embedded or published"),
    ],
)
def test_mistakes_are_named(act: object, message: str, lexicon: Lexicon) -> None:
    with pytest.raises(UserError, match=message):
        act(lexicon)  # type: ignore[operator]


# ------------------------------------------------------------------------------------------------------- vocabulary


def test_the_vocabulary_never_moves(lexicon: Lexicon) -> None:
    """Trained models are useless with other numbers: a change here is a new lexicon."""
    import hashlib

    assert len(lexicon.vocabulary) == len(set(lexicon.vocabulary)) == 850
    digest = hashlib.sha256("\n".join(lexicon.vocabulary).encode()).hexdigest()
    assert digest[:16] == "364e2eebb479fae3"
    assert lexicon.vocabulary[:4] == (BOS, ".", ",", ":")
    words = lexicon.vocabulary[lexicon.vocabulary.index("Z") + 1 :]
    assert list(words) == sorted(words)


def test_lists_do_not_overlap_where_it_would_blur_roles(lexicon: Lexicon) -> None:
    for one, other in (("arguments", "descriptions"), ("names", "places"), ("things", "durations")):
        assert set(getattr(lexicon, one)).isdisjoint(getattr(lexicon, other))
    assert len(lexicon.names) == len(set(lexicon.names)) == 99


def write_published(folder: Path) -> None:
    """Word lists of the published form, a few words each."""
    files = {
        "_house_lm/ioi_lexicon.json": {
            "NAMES": ["Ann", "Bob", "Cy", "Dora", "Eve", "Finn"],
            "PLACES": ["store"],
            "OBJECTS": ["ring"],
            "BABA_TEMPLATES": ["Then, [B] and [A] went to the [PLACE]. [B] gave a [OBJECT] to [A]"],
        },
        "_house_lm/coloured_objects_lexicon.json": {
            "all_simple_objects": ["pencil", "cup"],
            "all_simple_colors": ["red", "blue"],
            "surfaces": ["table"],
            "subject_starts": ["there is", "I see"],
        },
        "sae_circuits/greater_than_nouns.json": {"nouns_acdc": ["war", "trip", "work", "fair", "feud"]},
        "sae_circuits/docstring_lexicon.json": {
            "argument_names": ["data", "name", "file", "value", "test", "new", "line"],
            "description_nouns": ["data", "price", "cost"],
        },
    }
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(content))


def test_the_published_lists_are_read_where_they_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REPRISE_DATA", str(tmp_path))
    house_lexicon.load_lexicon.cache_clear()
    with pytest.raises(UserError, match=r"ioi_lexicon\.json is missing.*Easy-Transformer.*'embedded'"):
        load_lexicon("published")
    write_published(tmp_path)
    lexicon = load_lexicon("published")
    assert lexicon.ioi_templates == ("Then , [B] and [A] went to the [PLACE] . [B] gave a [OBJECT] to",)
    assert lexicon.descriptions == ("price", "cost"), "no argument is a description"
    words = texts(generate("ioi", 5, make_stream(0, "train"), lexicon).compact(), lexicon)
    assert all(row[-6:-3] == ["gave", "a", "ring"] for row in words)
    (tmp_path / "_house_lm/ioi_lexicon.json").write_text("{")
    house_lexicon.load_lexicon.cache_clear()
    with pytest.raises(UserError, match="is damaged"):
        load_lexicon("published")
    house_lexicon.load_lexicon.cache_clear()
