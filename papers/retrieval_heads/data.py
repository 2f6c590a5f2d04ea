"""Needle tests for house models, the published head scores, and the paper's needles and haystacks.

Read from `$REPRISE_DATA/<slug>/`, as their SOURCE.md describes them:

    head_scores.npz              of seven models [layers, heads, tests] float16: scores in the tests that succeeded
    needles.jsonl                needle, question, real_needle (the span of the answer)
    haystack_part{1,2,3}.txt.gz  novels, one part a needle
"""

from __future__ import annotations

import gzip
import json
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shared.config import Stage, UserError, data_root
from shared.data.house_corpora import CODE_LENGTH, SENTENCE_LENGTHS, distinct, generate, make_stream
from shared.data.house_lexicon import BOS, CODES, DIGITS, Lexicon, load_lexicon
from shared.evaluation.abilities import ABILITIES, draw_documents
from shared.files import atomic_path, write_json

from .config import Form, Grid, House, Params, TwoSteps
from .model import Needles

Integers = NDArray[np.int64]
Generator = np.random.Generator

PUBLISHED = {
    "llama_2_7b_80k": "llama-2-7b-80k",
    "llama_2_13b_64k": "llama-2-13b-64k",
    "Yi_6B_200K": "yi-6b-200k",
    "Mistral_7B_v0_2_hf": "mistral-7b-v0.2",
    "Mixtral_8x7B_v0_1": "mixtral-8x7b-v0.1",
    "Qwen1_5_14B": "qwen1.5-14b",
    "Qwen1_5_14B_Chat": "qwen1.5-14b-chat",
}
"""Names in the authors' files, and those in the ledger."""

QUESTIONS: dict[Form, str] = {"plain": "What is the code of", "chat": "Tell me the code for"}
FACT = "The code of"
TWO_STEPS = "Answer for"
Ending = Literal["needle", "at_once", "in_steps"]
ANSWER_LENGTH: Mapping[str, int] = {"needle": CODE_LENGTH, "at_once": 1, "in_steps": 3}
PARTS = 3
FLUENCY_LENGTH = 40
# `The code of NAME c c c .`
FACT_LENGTH = 4 + CODE_LENGTH + 1


def prepare(stage: Stage[Params]) -> None:
    """Write to data/ what the profile asks for: tests of house models, published scores, texts."""
    params, folder = stage.params, stage.data_dir
    folder.mkdir(parents=True, exist_ok=True)
    source = data_root() / stage.slug
    if params.published:
        _save(folder / "published.npz", read_published(source / "head_scores.npz"))
    if params.checkpoints:
        write_json(folder / "texts.json", read_texts(source))
    if params.house:
        lexicon = load_lexicon("embedded")
        for seed in params.seeds:
            for name, tests in house_tests(params.house, seed, lexicon):
                _save(folder / f"{name}-seed{seed}.npz", tests)
    # The stage's outputs are there whatever the profile asks for.
    write_json(folder / "profile.json", {"profile": stage.profile})


# --- What the authors published ---------------------------------------------------------------------------------------


def read_published(path: Path) -> dict[str, NDArray[np.float32]]:
    """Scores [tests, layers, heads] by the ledger's names; a score is one of the released code's (`counted_score`)."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            scores = {name: archive[key].transpose(2, 0, 1).astype(np.float32) for key, name in PUBLISHED.items()}
    except FileNotFoundError:
        raise UserError(f"{path} is missing: put the authors' scores there, as data.py describes them") from None
    except (KeyError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is not the table of the seven models' scores: {error}") from None
    for name, values in scores.items():
        if not np.isfinite(values).all() or (values < 0).any():
            raise UserError(f"{path}: the scores of {name} must be finite and not negative")
    return scores


def read_texts(folder: Path) -> dict[str, Any]:
    """The paper's needles, and a haystack for each."""
    try:
        lines = (folder / "needles.jsonl").read_text(encoding="utf-8").splitlines()
        needles = [json.loads(line) for line in lines if line.strip()]
        haystacks = []
        for part in range(1, PARTS + 1):
            with gzip.open(folder / f"haystack_part{part}.txt.gz", "rt", encoding="utf-8") as file:
                haystacks.append(file.read())
    except FileNotFoundError as error:
        raise UserError(f"{error.filename} is missing: put needles and haystacks there, as data.py describes") from None
    except (json.JSONDecodeError, gzip.BadGzipFile, EOFError, UnicodeDecodeError) as error:
        raise UserError(f"needles or haystacks in {folder} are damaged: {error}") from None
    for number, needle in enumerate(needles, 1):
        if lacking := {"needle", "question", "real_needle"} - set(needle):
            raise UserError(f"{folder / 'needles.jsonl'}, line {number} lacks {', '.join(sorted(lacking))}")
    return {"needles": needles, "haystacks": haystacks}


# --- Tests of house models --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prompts:
    """Prompts of one length [B, T], and the token [B] that is due (-1: any of several)."""

    tokens: Tensor
    answer: Tensor


def house_tests(house: House, seed: int, lexicon: Lexicon) -> Iterator[tuple[str, dict[str, NDArray]]]:
    """All tests of the models of a seed, as arrays to be saved, by name."""
    for model in house.models:
        # The heads are found with other documents than those that they are masked in.
        for part in ("detection", "masking"):
            arrays = {}
            for length in model.grid.lengths:
                rng = make_stream(seed, "test", "retrieval heads", model.name, part, length)
                needles = house_needles(model.grid, length, house.distractors, rng, lexicon, model.form)
                arrays |= {f"{length}/{key}": value for key, value in _arrays(needles).items()}
            yield f"{part}-{model.name}", arrays
        if model.two_steps:
            yield from two_step_tests(house, model.two_steps, seed, lexicon)
    rng = make_stream(seed, "test", "retrieval heads", "filler")
    yield "filler", {"0/tokens": begun_sentences(house.filler_documents, rng, lexicon), "0/answer": np.array([-1])}
    scenes = draw_documents(ABILITIES["colored_objects"], house.scene_documents, lexicon, seed)
    ends = scenes.answers.argmax(axis=1)
    arrays = {}
    for end in np.unique(ends):
        chosen = scenes.tokens[ends == end]
        arrays |= {f"{end}/tokens": chosen[:, :end], f"{end}/answer": chosen[:, end]}
    yield "scene", arrays


def house_needles(
    grid: Grid, length: int, distractors: int, rng: Generator, lexicon: Lexicon, form: Form = "plain"
) -> Needles:
    """Needles in contexts of `length` tokens behind `<bos>`: one fact `The code of NAME c c c .` at the given depth.

    The haystack is filler sentences with `distractors` facts about others at random borders of sentences. The needle is
    inserted as in the paper: at its depth, moved back to behind the nearest full stop.
    """
    num_filler = length - (distractors + 1) * FACT_LENGTH
    if num_filler < max(SENTENCE_LENGTHS):
        raise UserError(
            f"a context of {length} tokens has no room for {distractors + 1} facts of {FACT_LENGTH} tokens among "
            f"filler sentences: make it {(distractors + 1) * FACT_LENGTH + max(SENTENCE_LENGTHS)} tokens at least"
        )
    count = len(grid.depths) * grid.documents
    depth = np.repeat(grid.depths, grid.documents)
    names = lexicon.encode(lexicon.names)[distinct(rng, count, len(lexicon.names), distractors + 1)]
    codes = lexicon.encode(CODES)[distinct(rng, count, len(CODES), (distractors + 1) * CODE_LENGTH)]
    codes = codes.reshape(count, distractors + 1, CODE_LENGTH)
    frame, stop = lexicon.encode(FACT), lexicon.encode(".")
    haystacks = filler_sentences(count, num_filler, rng, lexicon)
    rows, begins = [], []
    for row in range(count):
        facts = [np.concatenate([frame, names[row, k : k + 1], codes[row, k], stop]) for k in range(distractors + 1)]
        context = haystacks[row]
        for fact in facts[1:]:
            context = _insert(context, fact, rng.choice(borders(context, stop)))
        begin = insertion_point(context, float(depth[row]), stop)
        rows.append(_insert(context, facts[0], begin))
        begins.append(begin)
    question = np.broadcast_to(lexicon.encode(QUESTIONS[form]), (count, len(QUESTIONS[form].split())))
    first = np.broadcast_to(lexicon.encode(BOS), (count, 1))
    begin = torch.tensor(begins) + 1
    return Needles(
        tokens=torch.from_numpy(np.concatenate([first, np.stack(rows), question, names[:, :1]], axis=1)).long(),
        answer=torch.from_numpy(codes[:, 0]).long(),
        start=begin + len(frame) + 1,
        context=torch.tensor([[1, length + 1]]).repeat(count, 1),
        needle=torch.stack([begin, begin + FACT_LENGTH], dim=1),
        depth=torch.from_numpy(depth).double(),
        item=torch.arange(count) % grid.documents,
        length=length,
    )


def two_step_tests(
    house: House, task: TwoSteps, seed: int, lexicon: Lexicon
) -> Iterator[tuple[str, dict[str, NDArray]]]:
    """The same questions with answers that are due at once, and in steps."""
    for ending in ("at_once", "in_steps"):
        arrays = {}
        for length in task.lengths:
            rng = make_stream(seed, "test", "retrieval heads", "two steps", length)
            documents = end_with(random_needles(house, length, task.documents, rng, lexicon), ending, lexicon)
            arrays[f"{length}/tokens"] = documents[:, : -ANSWER_LENGTH[ending] - 1].numpy()
            arrays[f"{length}/answer"] = documents[:, -2].numpy()
        yield ending, arrays


def random_needles(house: House, length: int, count: int, rng: Generator, lexicon: Lexicon) -> Needles:
    """Needle tests of one length at random depths."""
    grid = Grid(lengths=(length,), depths=tuple(rng.uniform(0, 100, size=count).tolist()))
    return house_needles(grid, length, house.distractors, rng, lexicon)


def end_with(needles: Needles, ending: Ending, lexicon: Lexicon) -> Tensor:
    """Whole documents [B, T]: contexts of needle tests, a question about the needle, its answer and a full stop.

    Besides the code there is an answer of two steps, section 4.3 (chain of thought) in small: the digit that belongs to
    the code's first word. The n-th of the 40 code words belongs to digit n modulo 10, which no context says: it has to
    be in the weights. The prompt's last token says whether that word is to be written down before the digit:

        needle      … The code of NAME c13 c8 c5 . …   What is the code of NAME c13 c8 c5 .
        at_once     … The code of NAME c13 c8 c5 . …   Answer for NAME = 3 .
        in_steps    … The code of NAME c13 c8 c5 . …   Answer for NAME : c13 = 3 .
    """

    def words(text: str) -> Tensor:
        return torch.from_numpy(lexicon.encode(text)).long().expand(len(needles), -1)

    if ending == "needle":
        return torch.cat([needles.tokens, needles.answer, words(".")], dim=1)
    context = needles.tokens[:, : 1 + needles.length]
    name, word = needles.tokens[:, -1:], needles.answer[:, :1]
    digit = words(" ".join(DIGITS)).gather(1, (word - words(CODES[0])) % len(DIGITS))
    step = [words(":"), word] if ending == "in_steps" else []
    return torch.cat([context, words(TWO_STEPS), name, *step, words("="), digit, words(".")], dim=1)


def filler_sentences(count: int, length: int, rng: Generator, lexicon: Lexicon) -> Integers:
    """Filler sentences of 4 to 8 words and a full stop, [count, length]; the last of a row ends with the row."""
    stop = int(lexicon.encode(".")[0])
    shortest, longest = SENTENCE_LENGTHS
    num_sentences = length // (shortest + 1) + 1
    words = generate("filler", count * num_sentences, rng, lexicon).tokens[:, 1 : longest + 1]
    words = words.reshape(count, num_sentences, longest)
    sizes = rng.integers(shortest, longest + 1, size=(count, num_sentences))
    rows = []
    for sentences, row_sizes in zip(words, sizes, strict=True):
        row = np.concatenate(
            [np.append(sentence[:size], stop) for sentence, size in zip(sentences, row_sizes, strict=True)]
        )
        row = row[:length]
        # A sentence that is cut off ends here; one of which nothing is left but its full stop would be none.
        row[-1] = stop
        if row[-2] == stop:
            row[-2] = words[0, 0, 0]
        rows.append(row)
    return np.stack(rows).astype(np.int64)


def begun_sentences(count: int, rng: Generator, lexicon: Lexicon) -> Integers:
    """Filler sentences, and the first words of another one, which cannot end yet: [count, T], from `<bos>` on."""
    first = np.broadcast_to(lexicon.encode(BOS), (count, 1))
    begun = generate("filler", count, rng, lexicon).tokens[:, 1 : SENTENCE_LENGTHS[0]]
    return np.concatenate([first, filler_sentences(count, FLUENCY_LENGTH, rng, lexicon), begun], axis=1)


def insertion_point(context: Integers, depth: float, stops: Integers) -> int:
    """Where a needle goes in a context [T]: at `depth` per cent, moved back to behind the nearest full stop (`stops`).

    At 100 per cent it is appended; without a full stop before it, it comes first.
    """
    if depth >= 100:
        return len(context)
    point = int(len(context) * depth / 100)
    before = borders(context[:point], stops)
    return int(before[before <= point].max())


def borders(context: Integers, stops: Integers) -> Integers:
    """Where sentences may begin: at 0, and behind each of the tokens `stops`."""
    return np.append(0, np.isin(context, stops).nonzero()[0] + 1)


def _insert(context: Integers, sentence: Integers, place: int) -> Integers:
    return np.concatenate([context[:place], sentence, context[place:]])


# --- Arrays on disk ---------------------------------------------------------------------------------------------------


def load_needles(folder: Path, part: str, name: str, seed: int) -> list[Needles]:
    """The needle tests of a house model, one batch a length."""
    batches = _load(folder / f"{part}-{name}-seed{seed}.npz")
    return [
        Needles(**{key: torch.from_numpy(value) for key, value in arrays.items()}, length=int(length))
        for length, arrays in batches.items()
    ]


def load_prompts(folder: Path, kind: str, seed: int) -> list[Prompts]:
    """Prompts of `filler`, `scene`, `at_once` or `in_steps`, one batch a length."""
    batches = _load(folder / f"{kind}-seed{seed}.npz").values()
    return [Prompts(*(torch.from_numpy(arrays[key]).long() for key in ("tokens", "answer"))) for arrays in batches]


def load_published(folder: Path) -> dict[str, NDArray[np.float64]]:
    """Published scores [tests, layers, heads] by model."""
    with np.load(folder / "published.npz", allow_pickle=False) as archive:
        return {name: archive[name].astype(np.float64) for name in archive.files}


def _arrays(needles: Needles) -> dict[str, NDArray]:
    parts = {field.name: getattr(needles, field.name) for field in fields(needles)}
    return {name: value.numpy() for name, value in parts.items() if isinstance(value, Tensor)}


def _save(path: Path, arrays: Mapping[str, NDArray]) -> None:
    with atomic_path(path) as temporary:
        np.savez_compressed(temporary, **arrays)


def _load(path: Path) -> dict[str, dict[str, NDArray]]:
    """Arrays by length, as `<length>/<name>` in the file."""
    if not path.is_file():
        raise UserError(f"{path} is missing: prepare the data first (reprise run prepare)")
    batches: dict[str, dict[str, NDArray]] = {}
    with np.load(path, allow_pickle=False) as archive:
        for key in archive.files:
            length, _, name = key.partition("/")
            batches.setdefault(length, {})[name] = archive[key]
    return batches
