"""Needles in haystacks of running text, for any tokenizer: the paper's tests, made as in the released code."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from shared.config import UserError
from shared.lm.hooked import HookedLM

from .config import Grid
from .data import insertion_point
from .model import Needles

QUESTION = "Based on the content of the book, Question: {question}\nAnswer:"
# Where the context goes in a chat model's turn: something that no template changes.
PLACE = "@@CONTEXT@@"


class Haystack:
    """A text and a needle as one model's tokens, from which contexts of any length and depth are made."""

    def __init__(
        self, lm: HookedLM, text: str, needle: Mapping[str, str], item: int, *, chat: bool, buffer: int
    ) -> None:
        self.lm, self.item, self.buffer = lm, item, buffer
        self.needle = lm.encode(needle["needle"]).cpu().numpy()
        self.text = lm.encode(text, allow_unknown=True).cpu().numpy()
        self.reference = needle["real_needle"]
        answer = lm.encode(self.reference).cpu().numpy()
        self.offset = find_span(self.needle, answer)
        self.answer = self.needle[self.offset : self.offset + len(answer)]
        self.before, self.after = self._frame(needle["question"], chat)

    def _frame(self, question: str, chat: bool) -> tuple[np.ndarray, np.ndarray]:
        """The tokens before and after the context."""
        tokenizer = self.lm.tokenizer
        question = QUESTION.format(question=question)
        if chat:
            if not getattr(tokenizer, "chat_template", None):
                raise UserError(f"{self.lm.name} has no chat template: say `chat: false`, or take a chat model")
            turn = [{"role": "user", "content": f"<book>{PLACE}</book>\n{question}"}]
            text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
            before, _, after = text.partition(PLACE)
        else:
            before, after = getattr(tokenizer, "bos_token", None) or "", "\n" + question
        encoded = (self.lm.encode(part, allow_unknown=True).cpu().numpy() for part in (before, after))
        first, last = (part.astype(np.int64) for part in encoded)
        return first, last

    def test(self, length: int, depth: float) -> Needles:
        """One test: the needle at `depth` per cent of a context of `length` tokens, less the buffer for the answer."""
        room = length - self.buffer - len(self.needle)
        if room < 1:
            raise UserError(
                f"a context of {length} tokens has no room for the needle of {len(self.needle)} and a buffer of "
                f"{self.buffer}: make lengths greater"
            )
        context = np.resize(self.text, room)
        stops = self.lm.encode(".").cpu().numpy()
        stops = np.union1d(stops, _full_stops(self.lm))
        begin = insertion_point(context, depth, stops)
        context = np.concatenate([context[:begin], self.needle, context[begin:]])
        first = len(self.before)
        tokens = np.concatenate([self.before, context, self.after]).astype(np.int64)
        self._check_length(len(tokens))
        return Needles(
            tokens=torch.from_numpy(tokens)[None],
            answer=torch.from_numpy(self.answer.astype(np.int64))[None],
            start=torch.tensor([first + begin + self.offset]),
            context=torch.tensor([[first, first + len(context)]]),
            needle=torch.tensor([[first + begin, first + begin + len(self.needle)]]),
            depth=torch.tensor([depth], dtype=torch.float64),
            item=torch.tensor([self.item]),
            length=length,
        )

    def _check_length(self, length: int) -> None:
        longest = self.lm.max_length
        if longest is not None and length > longest:
            raise UserError(
                f"{self.lm.name} reads {longest} tokens at most, and a test has {length}: make lengths shorter, or "
                "take a model with a longer context"
            )


def tests(
    lm: HookedLM, texts: Mapping[str, Any], grid: Grid, *, chat: bool, buffer: int
) -> Iterator[tuple[Needles, str]]:
    """All tests of a grid, each with the reference answer: every needle in its own haystack."""
    for item, (needle, text) in enumerate(zip(texts["needles"], texts["haystacks"], strict=True)):
        haystack = Haystack(lm, text, needle, item, chat=chat, buffer=buffer)
        for length in grid.lengths:
            for depth in grid.depths:
                yield haystack.test(length, depth), haystack.reference


def find_span(needle: np.ndarray, answer: np.ndarray) -> int:
    """Where in a needle [T] the span of the answer [A] begins.

    As in the released code: the first window of A tokens that has more than 0.9 of the span's different tokens, since a
    tokenizer may split the span differently inside of a sentence. Here, without any such window, that with the most.
    """
    if len(answer) > len(needle):
        answer = answer[: len(needle)]
    windows = np.lib.stride_tricks.sliding_window_view(needle, len(answer))
    wanted = set(answer.tolist())
    overlap = np.array([len(wanted & set(window.tolist())) / len(wanted) for window in windows])
    if overlap.max() == 0:
        raise UserError("the needle does not hold the span of its answer (real_needle): correct needles.jsonl")
    return int(overlap.argmax() if overlap.max() <= 0.9 else (overlap > 0.9).argmax())


@lru_cache(maxsize=4)
def _texts(lm: HookedLM) -> tuple[str, ...]:
    """The text of every token of a model's vocabulary."""
    return tuple(lm.tokenizer.batch_decode([[token] for token in range(len(lm.tokenizer))]))


def _full_stops(lm: HookedLM) -> np.ndarray:
    return np.array([token for token, text in enumerate(_texts(lm)) if text.strip().endswith(".")], dtype=np.int64)


def ends_of_line(lm: HookedLM) -> torch.Tensor:
    """Tokens that end an answer: those with a newline, and the end of the text."""
    ends = [token for token, text in enumerate(_texts(lm)) if "\n" in text]
    last = getattr(lm.tokenizer, "eos_token_id", None)
    return torch.tensor(sorted({*ends, *([] if last is None else [last])}), device=lm.device)


def rouge_recall(reference: str, answer: str) -> float:
    """ROUGE-1 recall with stemming, in [0, 1], by the library that the released code uses."""
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise UserError("answers in running text are scored with rouge-score: pip install rouge-score") from None
    return _scorer(RougeScorer).score(reference, answer)["rouge1"].recall


@lru_cache(maxsize=1)
def _scorer(make: Any) -> Any:
    return make(["rouge1"], use_stemmer=True)
