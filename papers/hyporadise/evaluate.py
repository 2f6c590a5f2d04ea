"""Counts what all transcripts get wrong, beside voting, re-ranking and the oracles; draws the figures.

`wer` has a row an utterance: 100 · edits / mean number of reference words, in percent, so that the mean of the rows is
the corpus word error rate (sum of edits over sum of reference words) and differences between models can be resampled.
`corpus_wer` is that rate, `macro_wer` the published script's: the mean of the utterances' rates, punctuation and digits
removed. `wer_reduction` and `recovered_out_of_list` are shares that are made of rows in the same way.
`errors_over_first` are a model's errors over those of the first hypotheses. `item` is the
utterance's place among its domain's test lists.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from shared.config import Stage, UserError
from shared.evaluation.scores import write_metrics, write_scores
from shared.evaluation.transcription import (
    Errors,
    compositional_oracle,
    count_changes,
    count_errors,
    nbest_oracle,
    strip_punctuation,
)
from shared.files import write_json
from shared.tracking import open_run

from . import baselines, data, figures
from .config import Params, Recorded
from .data import SPLITS, Lists, Prepared
from .train import run_folder

Row = dict[str, Any]
Outputs = dict[tuple[str, int], list[str]]
# Of values by utterance; the whole is kept in full.
DIGITS = 5
ALL_LISTS = "all_lists"
EXAMPLES = 3


def evaluate(stage: Stage[Params]) -> None:
    """Write scores.csv, costs.csv (which no two runs measure alike), examples.json, metrics.json and figures."""
    prepared, params = data.load(stage.data_dir), stage.params
    lists = prepared.lists
    outputs, weights = untrained(lists, params)
    outputs |= transcripts(stage, len(lists["test"]))
    rows = [row for domain in prepared.domains for row in domain_rows(lists["test"], outputs, domain)]
    rows += whole_domains(prepared, params)
    rows += [_row("lm_rank_trigram", domain, "weight", 0, value) for domain, value in weights.items()]
    frame = pd.DataFrame(rows)
    write_scores(stage.results_dir / "scores.csv", frame)
    write_scores(stage.results_dir / "costs.csv", pd.DataFrame(costs(stage, prepared)))
    write_metrics(stage, frame, prepared.index["source"])
    shown = examples(lists["test"], outputs) if may_be_shown(prepared, params) else []
    write_json(stage.results_dir / "examples.json", shown)
    paths = figures.draw(stage, frame, shown)
    if stage.run:
        stage.run.log_table(stage.results_dir / "scores.csv")
        for path in paths:
            stage.run.log_artifact(path, "figures")
        track_scores(stage, frame)


# --- Transcripts ------------------------------------------------------------------------------------------------------


def untrained(lists: dict[str, Lists], params: Params) -> tuple[Outputs, dict[str, float]]:
    """Transcripts of what needs no training but counting, and the weights of re-ranking by domain."""
    test = lists["test"]
    trigram = baselines.trigram(lists["train"].references, params.reranking.order)
    ranked, weights = baselines.rerank(lists["validation"], test, trigram, params.reranking.weights)
    outputs = {("one_best", 0): baselines.first(test), ("rover", 0): baselines.voted(test)}
    return outputs | {("lm_rank_trigram", 0): ranked}, weights


def transcripts(stage: Stage[Params], size: int) -> Outputs:
    """What each model and seed wrote, by name of the model (and number of demonstrations behind a slash)."""
    outputs: Outputs = {}
    for model in (*stage.params.models, *stage.params.checkpoints):
        for seed in stage.params.seeds:
            path = run_folder(stage, model, seed) / "transcripts.json"
            try:
                written = json.loads(path.read_text(encoding="utf-8"))
            except FileNotFoundError:
                raise UserError(f"{path} is missing: run the stage train of {model} first (dvc repro)") from None
            for name, texts in written.items():
                if len(texts) != size:
                    raise UserError(f"{path} has {len(texts)} transcripts of {size} lists: run its stage again")
                outputs[name, seed] = texts
    return outputs


# --- Scores -----------------------------------------------------------------------------------------------------------


def domain_rows(test: Lists, outputs: Outputs, domain: str) -> Iterator[Row]:
    """All scores of a domain's test lists."""
    chosen = test.rows_of(domain)
    nbest, references = [test.nbest[row] for row in chosen], [test.references[row] for row in chosen]
    yield from oracle_rows(nbest, references, domain)
    reference = count_errors(references, [each[0] for each in nbest])
    for (name, seed), texts in outputs.items():
        written = [texts[row] for row in chosen]
        errors = count_errors(references, written)
        shown, more = _demonstrations(name)
        yield from error_rows(errors, shown, domain, seed, more)
        yield _row(shown, domain, "macro_wer", seed, 100 * published_rate(references, written)) | more
        if shown.startswith("lm_rank"):
            gains = (reference.edits - errors.edits) / max(reference.edits.mean(), 1e-12)
            yield from _items(shown, domain, "wer_reduction", seed, gains)
        if shown in ("one_best", "rover", "lm_rank_trigram"):
            continue
        yield _row(shown, domain, "errors_over_first", seed, errors.edits.sum() / max(reference.edits.sum(), 1)) | more
        changes = count_changes(references, nbest, written)
        if changes.out_of_list.sum():
            share = changes.recovered / changes.out_of_list.mean()
            yield from (row | more for row in _items(shown, domain, "recovered_out_of_list", seed, share))
        words = errors.reference_lengths.sum()
        for metric in ("repaired", "broken"):
            yield _row(shown, domain, metric, seed, 100 * getattr(changes, metric).sum() / words) | more


def oracle_rows(nbest: Sequence[Sequence[str]], references: Sequence[str], dataset: str) -> Iterator[Row]:
    """The two bounds of a domain: the best hypothesis of each list, and words of all hypotheses recombined."""
    yield from error_rows(nbest_oracle(references, nbest), "oracle_nbest", dataset, 0)
    yield from error_rows(compositional_oracle(references, nbest), "oracle_compositional", dataset, 0)


def error_rows(errors: Errors, model: str, dataset: str, seed: int, more: Row | None = None) -> Iterator[Row]:
    """Word error rate in percent, by utterance and of the whole."""
    more = more or {}
    for row in _items(model, dataset, "wer", seed, 100 * errors.edits / errors.reference_lengths.mean()):
        yield row | more
    yield _row(model, dataset, "corpus_wer", seed, 100 * errors.rate) | more


def published_rate(references: Sequence[str], outputs: Sequence[str]) -> float:
    """The published script's rate: utterances averaged, punctuation and digits removed, empty references dropped."""
    cleaned = [[strip_punctuation(text) for text in texts] for texts in (references, outputs)]
    return count_errors(*cleaned).macro_rate


def whole_domains(prepared: Prepared, params: Params) -> Iterator[Row]:
    """First hypothesis and oracles of all lists of the real domains, in which nothing is trained."""
    for name, domain in params.domains.items():
        if not isinstance(domain, Recorded) or domain.lists is None:
            continue
        parts = [(prepared.lists[split], row) for split in SPLITS for row in prepared.lists[split].rows_of(name)]
        nbest, references = [part.nbest[row] for part, row in parts], [part.references[row] for part, row in parts]
        dataset = f"{name}/{ALL_LISTS}"
        yield from error_rows(count_errors(references, [each[0] for each in nbest]), "one_best", dataset, 0)
        yield from oracle_rows(nbest, references, dataset)
        distinct = np.mean([len(set(each)) for each in nbest])
        yield _row("lists", dataset, "distinct_hypotheses", 0, float(distinct))


def costs(stage: Stage[Params], prepared: Prepared) -> Iterator[Row]:
    """What training and decoding took, by model and seed."""
    yield _row("lists", "costs", "lists_to_train_on", 0, len(prepared.lists["train"]))
    for model in (*stage.params.models, *stage.params.checkpoints):
        for seed in stage.params.seeds:
            record = json.loads((run_folder(stage, model, seed) / "costs.json").read_text(encoding="utf-8"))
            for metric, value in record.items():
                yield _row(model, "costs", metric, seed, value)


def track_scores(stage: Stage[Params], frame: pd.DataFrame) -> None:
    """Add each model's word error rate to the run that trained it, as `test/wer/<domain>`."""
    rates = frame[frame.metric.eq("corpus_wer")].set_index(["model", "seed", "dataset"]).value
    for model in (*stage.params.models, *stage.params.checkpoints):
        for seed in stage.params.seeds:
            record = run_folder(stage, model, seed) / "run.json"
            if record.is_file() and (model, seed) in rates.index.droplevel(2):
                with open_run(json.loads(record.read_text(encoding="utf-8"))["run_id"]) as run:
                    run.log({f"test/wer/{name}": float(value) for name, value in rates[model, seed].items()}, step=1)


# --- Examples ---------------------------------------------------------------------------------------------------------


def may_be_shown(prepared: Prepared, params: Params) -> bool:
    """Only generated lists are printed: results are kept with the code, and the terms of the real ones contradict."""
    return any(not isinstance(params.domains[name], Recorded) for name in prepared.domains)


def examples(test: Lists, outputs: Outputs) -> list[dict[str, Any]]:
    """Lists with what the generator made of them: a word that none contains, a recombination, and a word it broke.

    Each is the first of its kind in the order of the test lists, under the first seed.
    """
    seeds = [seed for name, seed in outputs if name == "pointer_generator"]
    if not seeds:
        return []
    written = outputs["pointer_generator", min(seeds)]
    changes = count_changes(test.references, test.nbest, written)
    is_right = np.array([text == reference for text, reference in zip(written, test.references, strict=True)])
    best = nbest_oracle(test.references, test.nbest).edits
    short = np.array([len(reference.split()) <= 14 for reference in test.references])
    kinds = {
        "a word that no hypothesis contains": is_right & (changes.recovered > 0),
        "words of several hypotheses": is_right & (best > 0) & (changes.out_of_list == 0),
        "a right word made wrong": changes.broken > 0,
    }
    found = []
    for kind, fits in kinds.items():
        rows = np.flatnonzero(fits & short)
        if len(rows):
            row = int(rows[0])
            found.append(
                {"kind": kind, "nbest": test.nbest[row], "reference": test.references[row], "written": written[row]}
            )
    return found[:EXAMPLES]


def _demonstrations(name: str) -> tuple[str, Row]:
    """A model's name without its number of demonstrations, which becomes a column."""
    model, slash, count = name.partition("/")
    return model, {"demonstrations": int(count)} if slash else {}


def _items(model: str, dataset: str, metric: str, seed: int, values: NDArray[np.float64]) -> Iterator[Row]:
    for item, value in enumerate(values.tolist()):
        yield _row(model, dataset, metric, seed, float(f"{value:.{DIGITS}g}")) | {"item": item}


def _row(model: str, dataset: str, metric: str, seed: int, value: float) -> Row:
    return {"model": model, "dataset": dataset, "metric": metric, "seed": seed, "value": float(value)}
