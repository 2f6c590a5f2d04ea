"""What a house language model can do: tests on fresh documents, each beside chance and a bigram model.

A paper looks for a mechanism only in a model that has the ability the mechanism serves. Models are trained and tested
in `pipelines/house_lm`, which leaves a table beside each; `gate_rows` makes of it the rows that a claim's `gate` in
paper.yaml is held against.
"""

from __future__ import annotations

import csv
import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from shared.config import UserError
from shared.data.house_corpora import Documents, Split, generate, make_stream
from shared.data.house_lexicon import YEARS, Lexicon

# Tokens [B, T] int64 to logits [B, T, V].
Predictor = Callable[[Tensor], Tensor]

BATCH_SIZE = 50
# Counts that n-gram models add to every continuation, of which the best is taken.
ADDED = (0.001, 0.003, 0.01, 0.03, 0.1)
COLUMNS = ("mixture", "size", "seed", "ability", "metric", "value", "bigram", "chance", "at_least", "at_most", "passed")


@dataclass(frozen=True)
class Ability:
    """A test: documents of a `kind`, those whose details are as in `where`, and how predictions in them are counted.

    `chance` is what copying without binding reaches (any name, any listed color, any fact), or guessing where nothing
    can be copied; None is one in the vocabulary. `at_least` and `at_most` are the gate of its accuracy, `also` are
    gates of other metrics, which must be at least as high.
    """

    kind: str
    chance: float | None
    at_least: float | None = None
    at_most: float | None = None
    also: Mapping[str, float] = field(default_factory=dict)
    where: Mapping[str, int] = field(default_factory=dict)
    split: Split = "test"
    whole_answers: bool = False
    last_answer: bool = False
    score: Callable[[Documents, NDArray, NDArray, Lexicon], dict[str, float]] | None = None


def _logit_difference(documents: Documents, logits: NDArray, targets: NDArray, lexicon: Lexicon) -> dict[str, float]:
    """Logit of the indirect object minus that of the subject (Wang et al., 2022)."""
    rows = np.arange(len(logits))
    wrong = logits[rows, documents.details["subject"]]
    return {"logit_difference": float((logits[rows, targets] - wrong).mean(dtype=np.float64))}


def _later_years(documents: Documents, logits: NDArray, targets: NDArray, lexicon: Lexicon) -> dict[str, float]:
    """Share of documents whose predicted token is a year above YY; probability of those years, minus all others'.

    Hanna et al. (2023), section 2.
    """
    years = lexicon.encode(YEARS)
    later = np.arange(len(YEARS)) > documents.details["begin"][:, None]
    best = logits.argmax(axis=1)
    right = (later & (years == best[:, None])).any(axis=1)
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True)).astype(np.float64)
    mass = ((shifted / shifted.sum(axis=1, keepdims=True))[:, years] * later).sum(axis=1)
    return {"accuracy": float(right.mean()), "probability_difference": float((2 * mass - 1).mean())}


def _needle(kind: str, facts: int) -> Ability:
    gate = 0.9 if facts == 3 and kind != "needle_chat" else None
    return Ability(kind, 1 / facts, at_least=gate, where={"facts": facts}, whole_answers=True)


ABILITIES: dict[str, Ability] = {
    "induction": Ability("ind", None, at_least=0.9),
    "reverse_recall": Ability("vk", None),
    **{f"needle_{n}": _needle("needle", n) for n in (1, 2, 3)},
    **{f"needle_long_{n}": _needle("needle_long", n) for n in (1, 2, 3)},
    **{f"needle_chat_{n}": _needle("needle_chat", n) for n in (1, 2, 3)},
    "ioi": Ability("ioi", 1 / 2, at_least=0.9, score=_logit_difference),
    "ioi_seen_pairs": Ability("ioi", 1 / 2, split="train", score=_logit_difference),
    "colored_objects": Ability("co", 1 / 3, at_least=0.9, where={"scenes": 1}),
    "colored_objects_seen_pairs": Ability("co", 1 / 3, where={"scenes": 1}, split="train"),
    # For models that should not look colors up. Such a one guesses by which pairs it has seen, and thus never names a
    # held-out one: the gate is for pairs as in training.
    "colored_objects_official": Ability(
        "co_official", 1 / 3, at_least=0.33, at_most=0.8, last_answer=True, split="train"
    ),
    "colored_objects_official_held_out": Ability("co_official", 1 / 3, last_answer=True),
    "greater_than": Ability(
        # 99 is later than nearly every year, and a bigram model says it: only the spread tells a comparison from that.
        # GPT-2 small has 0.82 (Hanna et al.).
        "gt",
        1 / 2,
        at_least=0.95,
        also={"probability_difference": 0.8},
        score=_later_years,
    ),
    "docstring": Ability("doc", 1 / 3, at_least=0.9),
    "label_binding": Ability("mcq", 1 / 4, at_least=0.9),
    "label_binding_ordered": Ability("mcq_ordered", 1 / 4),
    "label_binding_random": Ability("mcq_random", 1 / 4),
    "label_binding_numbers": Ability("mcq_numbers", 1 / 4),
    **{
        f"sum_{n}": Ability("sum", 1 / 10, at_least={2: 0.9}.get(n), at_most={6: 0.6}.get(n), where={"terms": n})
        for n in (2, 3, 4, 5, 6)
    },
    **{f"boolean_{n}": Ability("boolean", 1 / 2, where={"depth": n}) for n in (1, 2, 3, 4)},
    "lookup": Ability("lookup", 1 / 4),
}
"""By name: `needle_3` is recall with three facts, `sum_2` a sum of two terms, `boolean_1` an expression of depth 1."""

BUT_COLORS = ("induction", "needle_3", "ioi", "greater_than", "docstring", "label_binding")
TOGETHER = {
    "copying_codes": ("induction", "needle_3"),
    "skills": (*BUT_COLORS, "colored_objects"),
    "skills_but_colors": BUT_COLORS,
}
"""Abilities asked for at once, by the accuracy of the weakest; the last is for models that should not have colors."""


def draw_documents(ability: Ability, count: int, lexicon: Lexicon, seed: int) -> Documents:
    """`count` fresh documents of a test, the same ones for every model of a seed."""
    rng = make_stream(seed, "test", "abilities", ability.kind)
    tokens, answers, details = [], [], []
    found, width = 0, 0
    while found < count:
        documents = generate(ability.kind, 2 * count, rng, lexicon, ability.split).compact()
        kept = np.ones(len(documents), dtype=bool)
        for name, value in ability.where.items():
            kept &= documents.details[name] == value
        kept = kept.nonzero()[0][: count - found]
        found, width = found + len(kept), max(width, documents.tokens.shape[1])
        tokens.append(documents.tokens[kept])
        answers.append(documents.answers[kept])
        details.append({name: values[kept] for name, values in documents.details.items()})
    tokens = [np.pad(part, ((0, 0), (0, width - part.shape[1])), constant_values=-1) for part in tokens]
    answers = [np.pad(part, ((0, 0), (0, width - part.shape[1]))) for part in answers]
    marks = np.concatenate(answers)
    if ability.last_answer:
        marks &= marks.cumsum(axis=1) == marks.sum(axis=1, keepdims=True)
    joined = {name: np.concatenate([part[name] for part in details]) for name in details[0]}
    return Documents(np.concatenate(tokens), marks, joined)


@torch.no_grad()
def measure(predict: Predictor, name: str, lexicon: Lexicon, *, count: int = 500, seed: int = 0) -> dict[str, float]:
    """One ability of a model, on `count` fresh documents: `accuracy`, and what else is known of the task.

    A prediction is the token of the highest logit in the whole vocabulary. With `whole_answers` all tokens of a
    document's answer must be right. Of several in `TOGETHER` it is the lowest accuracy.
    """
    if name in TOGETHER:
        tested = (measure(predict, each, lexicon, count=count, seed=seed) for each in TOGETHER[name])
        return {"accuracy": min(values["accuracy"] for values in tested)}
    if name not in ABILITIES:
        close = difflib.get_close_matches(name, ABILITIES, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise UserError(f"there is no ability {name!r}{hint}; choose among {', '.join(ABILITIES)}")
    ability = ABILITIES[name]
    documents = draw_documents(ability, count, lexicon, seed)
    device = next(predict.parameters()).device if isinstance(predict, torch.nn.Module) else torch.device("cpu")
    tokens = torch.from_numpy(documents.tokens.clip(min=0)).long()
    marks = torch.from_numpy(documents.answers[:, 1:])
    rows = []
    for batch, marked in zip(tokens.split(BATCH_SIZE), marks.split(BATCH_SIZE), strict=True):
        rows.append(predict(batch[:, :-1].to(device))[marked.to(device)].float().cpu())
    logits = torch.cat(rows).numpy()
    targets = documents.tokens[:, 1:][documents.answers[:, 1:]]
    right = logits.argmax(axis=1) == targets
    if ability.whole_answers:
        wrong = np.bincount(documents.answers.nonzero()[0], weights=~right, minlength=len(documents)) > 0
        right = ~wrong
    values = {"accuracy": float(right.mean())}
    return values | (ability.score(documents, logits, targets, lexicon) if ability.score else {})


# ------------------------------------------------------------------------------------------------------------ n-grams


class Bigram:
    """The next token's distribution given the last token alone, from counts with `add` more of every pair."""

    def __init__(self, tokens: ArrayLike, vocab_size: int, add: float = 0.01) -> None:
        stream = np.asarray(tokens, dtype=np.int64).ravel()
        pairs = np.bincount(stream[:-1] * vocab_size + stream[1:], minlength=vocab_size**2)
        counts = torch.from_numpy(pairs.reshape(vocab_size, vocab_size)).float() + add
        self.log_probabilities = (counts / counts.sum(dim=1, keepdim=True)).log()

    def __call__(self, tokens: Tensor) -> Tensor:
        return self.log_probabilities[tokens.cpu()]


def ngram_loss(train: ArrayLike, test: ArrayLike, order: int, vocab_size: int, add: float) -> float:
    """Mean loss in nats a token of an n-gram model with `add` more of every continuation, on `test` tokens."""
    contexts, whole = (_grams(train, n, vocab_size) for n in (order - 1, order))
    asked = _grams(test, order, vocab_size)
    above, below = _count(whole, asked), _count(contexts, asked // vocab_size)
    return float(-np.log((above + add) / (below + add * vocab_size)).mean())


def _grams(tokens: ArrayLike, order: int, vocab_size: int) -> NDArray[np.int64]:
    """Every run of `order` tokens as one number."""
    stream = np.asarray(tokens, dtype=np.int64).ravel()
    windows = np.lib.stride_tricks.sliding_window_view(stream, order)
    return windows @ (vocab_size ** np.arange(order - 1, -1, -1, dtype=np.int64))


def _count(grams: NDArray[np.int64], asked: NDArray[np.int64]) -> NDArray[np.int64]:
    known, counts = np.unique(grams, return_counts=True)
    place = np.searchsorted(known, asked).clip(max=len(known) - 1)
    return np.where(known[place] == asked, counts[place], 0)


@torch.no_grad()
def measure_language(
    predict: Predictor, train: ArrayLike, test: ArrayLike, vocab_size: int, *, length: int = 64, count: int = 500
) -> dict[str, float]:
    """Loss in nats a token on `count` windows of held-out text, beside those of n-gram models of the training text.

    N-gram models get the best of several added counts, chosen on the very windows of the test. `bigram_correlation` is
    Pearson's between the model's surprisals and the bigram model's.
    """
    stream = np.asarray(test, dtype=np.int64)
    if len(stream) <= length:
        raise UserError(f"the held-out text has {len(stream)} tokens, fewer than one window of {length}")
    starts = np.linspace(0, len(stream) - length - 1, min(count, len(stream) // length)).astype(int)
    windows = torch.from_numpy(stream[starts[:, None] + np.arange(length + 1)])
    device = next(predict.parameters()).device if isinstance(predict, torch.nn.Module) else torch.device("cpu")

    def surprisal(model: Predictor, where: torch.device) -> Tensor:
        losses = []
        for batch in windows.split(BATCH_SIZE):
            logits = model(batch[:, :-1].to(where)).float().cpu()
            losses.append(
                torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="none")
            )
        return torch.cat(losses).double()

    own = surprisal(predict, device)
    pairs = {add: surprisal(Bigram(train, vocab_size, add), torch.device("cpu")) for add in ADDED}
    bigram = min(pairs.values(), key=lambda losses: losses.mean().item())
    trigram = min(ngram_loss(train, windows.numpy(), 3, vocab_size, add) for add in ADDED)
    return {
        "loss": own.mean().item(),
        "bigram_loss": bigram.mean().item(),
        "trigram_loss": trigram,
        "loss_below_ngrams": min(bigram.mean().item(), trigram) - own.mean().item(),
        "bigram_correlation": torch.corrcoef(torch.stack([own, bigram]))[0, 1].item(),
    }


# -------------------------------------------------------------------------------------------------------------- tables


def ability_rows(
    predict: Predictor, baseline: Predictor, names: Sequence[str], lexicon: Lexicon, *, count: int = 500, seed: int = 0
) -> list[dict[str, Any]]:
    """A row an ability and metric: value, the bigram model's value, chance, the gate, and whether it is passed."""
    rows = []
    for name in names:
        values = measure(predict, name, lexicon, count=count, seed=seed)
        others = measure(baseline, name, lexicon, count=count, seed=seed)
        ability = ABILITIES[name]
        chance = 1 / len(lexicon.vocabulary) if ability.chance is None else ability.chance
        for metric, value in values.items():
            gate = {"at_least": ability.also.get(metric)}
            if metric == "accuracy":
                gate = {"chance": chance, "at_least": ability.at_least, "at_most": ability.at_most}
            rows.append(gated({"ability": name, "metric": metric, "value": value, "bigram": others[metric]} | gate))
    return rows


def language_rows(values: Mapping[str, float], name: str = "language") -> list[dict[str, Any]]:
    """The same for what `measure_language` returns: loss below both n-gram models', bigram correlation below 0.95."""
    gates = {"loss_below_ngrams": {"at_least": 0.0}, "bigram_correlation": {"at_most": 0.95}}
    rows = [
        {"ability": name, "metric": metric, "value": value} | gates.get(metric, {})
        for metric, value in values.items()
        if metric != "bigram_loss"
    ]
    rows[0]["bigram"] = values["bigram_loss"]
    return [gated(row) for row in rows]


def gated(row: dict[str, Any]) -> dict[str, Any]:
    """The row with `passed`, which is None where there is no gate."""
    low, high, value = row.get("at_least"), row.get("at_most"), row["value"]
    passed = None if low is None and high is None else (low is None or value >= low) and (high is None or value <= high)
    return row | {"passed": passed}


def write_gates(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as CSV, with blanks for what they lack."""
    from shared.files import atomic_path

    with atomic_path(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({name: repr(v) if isinstance(v := row.get(name), float) else v for name in COLUMNS})


def read_gates(folder: Path) -> list[dict[str, Any]]:
    """The table beside a trained model, numbers as numbers and blanks as None; `UserError` if there is none."""
    path = Path(folder) / "gates.csv"
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        return [{name: _typed(name, row[name]) for name in COLUMNS} for row in rows]
    except FileNotFoundError:
        raise UserError(f"{path} is missing: {folder} is not the folder of a house model; train one first") from None
    except (KeyError, ValueError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is damaged ({error}): run the model's stage in pipelines/house_lm again") from None


def gate_rows(folder: Path, model: str | None = None) -> list[dict[str, Any]]:
    """What a house model in `folder` can do, as rows of scores.csv for the claims' gates.

    `model` is by default `<mixture>/<size>`, `dataset` is `gate/<ability>`; a bigram model's values and chance stand
    beside it as models `bigram` and `chance`. In paper.yaml then:

        gate: {model: skills/S, dataset: gate/needle_3, metric: accuracy, at_least: 0.9}
    """
    scores = []
    for row in read_gates(folder):
        shared = {"dataset": f"gate/{row['ability']}", "metric": row["metric"], "seed": row["seed"]}
        values = {model or f"{row['mixture']}/{row['size']}": row["value"]} | {n: row[n] for n in ("bigram", "chance")}
        scores += [{"model": name, **shared, "value": value} for name, value in values.items() if value is not None]
    return scores


def _typed(name: str, text: str) -> Any:
    if name in ("mixture", "size", "ability", "metric"):
        return text
    if text == "":
        return None
    if name == "seed":
        return int(text)
    if name == "passed":
        return {"True": True, "False": False}[text]
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{name} is {text}")
    return value
