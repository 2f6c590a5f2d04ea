"""Prompts and answers as tokens, several rows to a sequence.

A sequence ("pack") holds groups, each of one table: a prefix and some rows behind it. A row sees its group's prefix and
itself, at the positions it would have alone, so that the loss is that of one sequence a row, while what rows share is
read once. See `packed_mask` and the tests.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shared.config import UserError
from shared.evaluation.language import IGNORED

from .config import LanguageModel
from .prompts import PromptParts

IntArray = NDArray[np.int64]
END, PAD = "<end>", "<pad>"


@dataclass(frozen=True)
class Tokenizer:
    """A byte-level BPE, with the tokens that end an answer and that pad."""

    bpe: Any
    end: int
    pad: int

    @property
    def vocab_size(self) -> int:
        return self.bpe.get_vocab_size()

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [each.ids for each in self.bpe.encode_batch(list(texts), add_special_tokens=False)]

    def decode(self, tokens: Sequence[Sequence[int]]) -> list[str]:
        return self.bpe.decode_batch([list(each) for each in tokens], skip_special_tokens=True)


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> Any:
    """A byte-level BPE from prompts and answers, whose tokens may be several words.

    `; job title is ` is one token, so that a cell costs little more than its value: half the tokens of a BPE of words,
    which would spend most of a small model's sequence on what all rows of a table repeat. A value never merges with
    the column's name before or after it.

    Digits are tokens of their own: a small model that must learn what numbers mean from a few thousand rows sees each
    of them often, and 5.4 and 5.5 differ in one token instead of being two rare ones.
    """
    from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Bpe

    bpe = Bpe(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(" is "), "merged_with_previous"),
            pre_tokenizers.Split(Regex("; "), "merged_with_next"),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return bpe


def load_tokenizer(settings: LanguageModel, path: Path) -> Tokenizer:
    """The tokenizer that was trained in preparation, or that of the pretrained model, which gets [PAD] and [MASK]."""
    from tokenizers import Tokenizer as Bpe

    if settings.pretrained is None:
        if not path.is_file():
            raise UserError(f"{path} is missing: run the stage prepare again")
        bpe = Bpe.from_file(str(path))
        return Tokenizer(bpe, bpe.token_to_id(END), bpe.token_to_id(PAD))
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(settings.pretrained, use_fast=True)
    except (OSError, ValueError) as error:
        raise UserError(
            f"language.pretrained: no tokenizer at {settings.pretrained!r} ({error}). Give a folder with "
            "tokenizer.json, or a name on the Hugging Face hub and a connection to it"
        ) from None
    loaded.add_special_tokens({"pad_token": "[PAD]", "mask_token": "[MASK]"})
    return Tokenizer(loaded.backend_tokenizer, loaded.eos_token_id, loaded.pad_token_id)


# --- Rows ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rows:
    """The tokens of a table's rows: `prefix`, and for each row the rest of its prompt and its answer.

    `overlong` says of how many rows something had to be left out.
    """

    prefix: list[int]
    prompts: list[list[int]]
    answers: list[list[int]] = field(default_factory=list)
    overlong: int = 0

    def whole(self) -> list[list[int]]:
        """The rows' prompts, prefix included."""
        return [self.prefix + prompt for prompt in self.prompts]


def encode_rows(
    tokenizer: Tokenizer,
    parts: PromptParts,
    answers: Sequence[str],
    context: int,
    overlong: str,
    answer_room: int | None = None,
) -> Rows:
    """Tokens of prompts and answers, which end with the end token, no longer than the context together.

    Where they are longer, `trim` first cuts the prefix down to half of the context, then takes features from the end of
    the row, so that the answer stays; `cut` drops what is over at the end, as the published code does, answer included.
    `answer_room` is how many tokens an answer needs, by default those of the longest given. `UserError` where the list
    of classes and the answer alone do not fit: there are too many classes.
    """
    prefix = tokenizer.encode([parts.prefix])[0]
    suffix = tokenizer.encode([parts.suffix])[0]
    rows = tokenizer.encode(parts.rows)
    written = [[*answer, tokenizer.end] for answer in tokenizer.encode(answers)] if answers else []
    if overlong == "cut":
        whole = Rows(prefix, [row + suffix for row in rows], written)
        return _cut(whole, context)
    room = context - len(suffix) - (answer_room or max(map(len, written), default=0))
    if room < 16:
        raise UserError(
            f"the list of classes and the answer need {context - room} tokens of a context of {context}: there are too "
            "many classes; raise language.context, or leave the table out"
        )
    longest = max(map(len, rows), default=0)
    too_long = sum(len(prefix) + len(row) > room for row in rows)
    if len(prefix) + longest > room:
        prefix = prefix[: max(room - longest, room // 2)]
    return Rows(prefix, [row[: room - len(prefix)] + suffix for row in rows], written, too_long)


def _cut(rows: Rows, context: int) -> Rows:
    prompts, answers, count = [], [], 0
    prefix = rows.prefix[: context - 1]
    for number, prompt in enumerate(rows.prompts):
        answer = rows.answers[number] if rows.answers else []
        room = context - len(prefix)
        count += len(rows.prefix) + len(prompt) + len(answer) > context
        prompts.append(prompt[:room])
        answers.append(answer[: max(room - len(prompt), 0)])
    return replace(rows, prefix=prefix, prompts=prompts, answers=answers if rows.answers else [], overlong=count)


# --- Packs -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Packs:
    """Sequences [N, L]: `tokens`, `positions`, `groups` (-1 is padding), `members` (0 is a group's prefix, rows count
    from 1) and `targets`, the token to predict at each place, or `IGNORED` outside of answers."""

    tokens: Tensor
    positions: Tensor
    groups: Tensor
    members: Tensor
    targets: Tensor

    @property
    def padding(self) -> float:
        """The share of tokens that are padding."""
        return (self.groups < 0).double().mean().item()

    def __len__(self) -> int:
        return len(self.tokens)


def pack_rows(tables: Sequence[Rows], length: int, rows_per_prefix: int, pad: int, seed: int) -> Packs:
    """Pack the rows of all tables, each with its answer, into sequences of up to `length` tokens.

    A group has up to `rows_per_prefix` rows of a table. `UserError` for a row that is longer than a pack.
    """
    # An answer's last token predicts nothing, and need not be read.
    read = [
        [prompt + answer[:-1] for prompt, answer in zip(rows.prompts, rows.answers, strict=True)] for rows in tables
    ]
    prefixes = [len(rows.prefix) for rows in tables]
    sizes = [[len(tokens) for tokens in rows] for rows in read]
    plan = fill_packs(prefixes, sizes, length, rows_per_prefix, np.random.default_rng(seed))
    used = [sum(prefixes[table] + sum(sizes[table][row] for row in rows) for table, rows in pack) for pack in plan]
    arrays = {
        name: np.full((len(plan), max(used)), value)
        for name, value in (("tokens", pad), ("positions", 0), ("groups", -1), ("members", 0), ("targets", IGNORED))
    }
    for number, pack in enumerate(plan):
        place = 0
        for group, (table, chosen) in enumerate(pack):
            rows = tables[table]
            shared = len(rows.prefix)
            for member, row in enumerate([None, *chosen]):
                tokens = rows.prefix if row is None else read[table][row]
                where = number, slice(place, place + len(tokens))
                arrays["tokens"][where] = tokens
                arrays["positions"][where] = np.arange(len(tokens)) + (0 if row is None else shared)
                arrays["groups"][where] = group
                arrays["members"][where] = member
                place += len(tokens)
                if row is not None and rows.answers[row]:
                    arrays["targets"][number, place - len(rows.answers[row]) : place] = rows.answers[row]
    return Packs(**{name: torch.from_numpy(array) for name, array in arrays.items()})


def fill_packs(
    prefixes: Sequence[int],
    rows: Sequence[Sequence[int]],
    length: int,
    rows_per_prefix: int,
    rng: np.random.Generator,
) -> list[list[tuple[int, list[int]]]]:
    """Packs of groups (table, its rows), of tokens in each table's prefix and rows.

    Tables come at random, those with more rows left sooner. Of a table's rows any is taken while there is room for two,
    and then the longest that fits, so that little room is left. `UserError` for rows that fit no pack,
    and for none at all.
    """
    for prefix, sizes in zip(prefixes, rows, strict=True):
        if sizes and prefix + max(sizes) > length:
            raise UserError(
                f"a row of {prefix + max(sizes)} tokens does not fit into packs of {length}: raise packing.length, or "
                "shorten prompts by prompt.max_columns or max_metadata_characters"
            )
    left = [sorted(range(len(sizes)), key=sizes.__getitem__) for sizes in rows]
    packs = []
    while any(left):
        counts = np.array([len(each) for each in left], dtype=float)
        order = rng.choice(len(left), int((counts > 0).sum()), replace=False, p=counts / counts.sum())
        room, pack = length, []
        for table in order.tolist():
            chosen: list[int] = []
            sizes = rows[table]
            while len(chosen) < rows_per_prefix:
                free = room - (0 if chosen else prefixes[table])
                fitting = bisect_right(left[table], free, key=sizes.__getitem__)
                if not fitting:
                    break
                is_last = free < 2 * sizes[left[table][-1]]
                row = left[table].pop(fitting - 1 if is_last else int(rng.integers(fitting)))
                room = free - sizes[row]
                chosen.append(row)
            if chosen:
                pack.append((table, chosen))
        packs.append(pack)
    if not packs:
        raise UserError("there are no rows to pack: check the numbers of rows in params.yaml")
    return packs


def packed_mask(groups: Tensor, members: Tensor) -> Tensor:
    """Which places [B, 1, L, L] see which: earlier ones of their own row, and their group's prefix.

    Padding sees itself, since attention to nothing is not a number.
    """
    length = groups.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=groups.device).tril()
    same_group = groups[:, :, None] == groups[:, None, :]
    visible = (members[:, None, :] == 0) | (members[:, :, None] == members[:, None, :])
    return (causal & same_group & visible)[:, None]
