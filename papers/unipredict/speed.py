"""What vectorized serialization, packing, and batched generation with a cache are worth, as ratios on one machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .augment import augmented_targets
from .config import LanguageModel, Params, PromptSettings, Variant
from .data import SUPERVISED, Prepared, Task, read_sources
from .generation import decode, read_prompts
from .model import Objective, build_model
from .prompts import MISSING, candidate_answers, plain, serialize_rows
from .tokens import Packs, Rows, Tokenizer, load_tokenizer, pack_rows
from .train import task_rows

Row = dict[str, Any]


def measure(params: Params, prepared: Prepared, tokenizer_path: Path) -> list[Row]:
    """Rows of costs.csv, data set `speed`: seconds, and ratios of the slower to the faster way of the same result."""
    tokenizer = load_tokenizer(params.language, tokenizer_path)
    rounds = params.speed.rounds
    rows = [*_serialization(params, rounds), *_augmentation(params, prepared)]
    rows += _training(params, prepared, tokenizer, rounds)
    rows += _generation(params, prepared, tokenizer, rounds)
    return rows


def fastest(runs: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Seconds of each, the least of some rounds that are taken in turns."""
    seconds = dict.fromkeys(runs, float("inf"))
    for _ in range(rounds):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            seconds[name] = min(seconds[name], time.perf_counter() - started)
    return seconds


def _serialization(params: Params, rounds: int) -> Iterator[Row]:
    tables = [table for table, _, _ in read_sources(params)]
    every = fastest({"all": lambda: [serialize_rows(table, params.prompt) for table in tables]}, 1)
    yield _row("serialization", "seconds_all_tables", every["all"])
    yield _row("serialization", "rows", sum(map(len, tables)))
    some = tables[:5]
    seconds = fastest(
        {
            "columns": lambda: [serialize_rows(table, params.prompt) for table in some],
            "loop": lambda: [serialize_in_a_loop(table, params.prompt) for table in some],
        },
        rounds,
    )
    yield _row("serialization", "loop_over_columns", seconds["loop"] / seconds["columns"])


def serialize_in_a_loop(table: Any, settings: PromptSettings) -> list[str]:
    """`serialize_rows` a row at a time, without significant digits."""
    rows = []
    for row in table.data:
        cells = []
        for column in table.features[: settings.max_columns]:
            value = row[column.name]
            if value is None:
                text = MISSING
            elif isinstance(value, float):
                rounded = round(value, settings.decimals)
                text = str(int(rounded)) if rounded.is_integer() else str(rounded)
            else:
                text = value.strftime("%Y-%m-%d") if column.kind == "date" else str(value)
            cells.append(f"{plain(column.name)} is {text}")
        rows.append("; ".join(cells))
    return rows


def _augmentation(params: Params, prepared: Prepared) -> Iterator[Row]:
    task = max(prepared.pool("supervised"), key=lambda task: len(task.table) * len(task.classes))
    rows = np.arange(len(task.table))
    started = time.perf_counter()
    augmented_targets(task.table, rows, task.classes.labels, len(task.classes), params.augmentation)
    yield _row("augmentation", "seconds_largest_table", time.perf_counter() - started)
    yield _row("augmentation", "rows", len(rows))


def _training(params: Params, prepared: Prepared, tokenizer: Tokenizer, rounds: int) -> Iterator[Row]:
    """The same rows in packs, and one row a sequence padded to the longest of its batch."""
    model = _model(params.language, tokenizer)
    tables = [_first(each, params.speed.rows) for each in _encoded(prepared, params, tokenizer, "train")]
    packed = pack_rows(tables, params.pack_length, params.packing.rows_per_prefix, tokenizer.pad, 0)
    single = one_row_a_sequence(tables, params.pack_length, tokenizer.pad)
    per_batch = max(1, round(params.training.batch_size * len(single) / len(packed)))
    runs = {
        "packed": lambda: _pass(model, packed, params.training.batch_size),
        "padded": lambda: _pass(model, single, per_batch),
    }
    seconds = fastest(runs, rounds)
    yield _row("packing", "padded_over_packed", seconds["padded"] / seconds["packed"])
    yield _row("packing", "rows_per_second", sum(len(each.prompts) for each in tables) / seconds["packed"])
    yield _row("packing", "padding", packed.padding)
    yield _row("packing", "padding_one_row_a_sequence", single.padding)


def one_row_a_sequence(tables: list[Rows], length: int, pad: int) -> Packs:
    """What padded batches of shuffled rows hold: each row with its table's prefix, padded to the longest."""
    each = [Rows(rows.prefix, [p], [a]) for rows in tables for p, a in zip(rows.prompts, rows.answers, strict=True)]
    packs = [pack_rows([one], length, 1, pad, 0) for one in each]
    longest = max(pack.tokens.shape[1] for pack in packs)
    fill = {"tokens": pad, "positions": 0, "groups": -1, "members": 0, "targets": -100}
    order = torch.randperm(len(packs), generator=torch.Generator().manual_seed(0))

    def joined(name: str) -> torch.Tensor:
        parts = [getattr(packs[number], name)[0] for number in order.tolist()]
        return torch.stack(
            [torch.nn.functional.pad(part, (0, longest - len(part)), value=fill[name]) for part in parts]
        )

    return Packs(**{name: joined(name) for name in fill})


def _pass(model: Any, packs: Packs, batch_size: int) -> None:
    objective = Objective(packs)
    for numbers in torch.arange(len(packs)).split(batch_size):
        objective(model, (numbers,), None)["loss"].backward()
        model.zero_grad()


def _generation(params: Params, prepared: Prepared, tokenizer: Tokenizer, rounds: int) -> Iterator[Row]:
    """Greedy answers of a fixed number of tokens: batched with a cache, one row at a time, and without a cache."""
    model = _model(params.language, tokenizer).eval()
    task = prepared.pool("supervised")[0]
    rows = _first(task_rows(task, SUPERVISED, "test", Variant(), params, tokenizer), params.speed.rows)
    answer = tokenizer.encode(candidate_answers(len(task.classes), per_table=False))[0]
    count = len(answer)
    runs = {
        "batched": lambda: generate(model, rows, count, tokenizer, params),
        "one_by_one": lambda: [
            generate(model, Rows(rows.prefix, [prompt]), count, tokenizer, params) for prompt in rows.prompts
        ],
        "without_cache": lambda: generate_without_cache(model, rows, count),
    }
    seconds = fastest(runs, rounds)
    yield _row("generation", "one_by_one_over_batched", seconds["one_by_one"] / seconds["batched"])
    yield _row("generation", "without_cache_over_batched", seconds["without_cache"] / seconds["batched"])
    yield _row("generation", "tokens_per_second", len(rows.prompts) * count / seconds["batched"])


def generate(model: Any, rows: Rows, count: int, tokenizer: Tokenizer, params: Params) -> list[list[int]]:
    """`count` greedy tokens after every prompt, together."""
    state = read_prompts(model, rows.prefix, rows.prompts, tokenizer.pad)
    greedy = torch.zeros(len(rows.prompts), dtype=torch.bool)
    # No token ends an answer here: all ways write as many.
    return decode(model, state, count, -1, params.decoding, greedy, torch.Generator())


@torch.no_grad()
def generate_without_cache(model: Any, rows: Rows, count: int) -> list[list[int]]:
    """The same, each prompt by itself and read anew for every token."""
    written = []
    for prompt in rows.whole():
        tokens = list(prompt)
        for _ in range(count):
            tokens.append(int(model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
        written.append(tokens[len(prompt) :])
    return written


def _model(settings: LanguageModel, tokenizer: Tokenizer) -> Any:
    return build_model(settings, tokenizer.vocab_size, end=tokenizer.end)


def _encoded(prepared: Prepared, params: Params, tokenizer: Tokenizer, side: str) -> list[Rows]:
    tasks: list[Task] = prepared.pool("supervised")[:8]
    return [task_rows(task, SUPERVISED, side, Variant(heavy=True), params, tokenizer) for task in tasks]


def _first(rows: Rows, count: int) -> Rows:
    return Rows(rows.prefix, rows.prompts[:count], rows.answers[:count])


def _row(model: str, metric: str, value: float) -> Row:
    return {"model": model, "dataset": "speed", "metric": metric, "seed": 0, "value": float(value)}
