"""Lists of hypotheses with their transcripts: generated ones and real ones, split; what models read them as.

Real lists lie under `$REPRISE_DATA/hyporadise`, JSON lines or the official JSON arrays, plain or gzipped: fields
`nbest` and `ref`, or the official `input`, `output` and `score` (see `shared.data.nbest`). Prepared are, in `data/`:

    lists/<split>   nbest, reference, score (per hypothesis; 0 where there are none), domain; Arrow
    text.txt        general text to pretrain on, a sentence a line
    tokenizer.json  byte pairs, of general text and training lists
    words.txt       words of the training lists, the most frequent first
    index.json      domains, source, digest
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.config import Stage, UserError, data_root
from shared.data.nbest import WordVocabulary, make_nbest, read_nbest, split_nbest
from shared.data.text import BytePairTokenizer
from shared.files import write_json, write_text
from shared.training import Job, run_jobs

from . import grammar, text
from .config import Params, Recorded, Simulated

if TYPE_CHECKING:
    import datasets

    from shared.training.parallel import Report

SPLITS = ("train", "validation", "test")
FRACTIONS = (0.7, 0.1, 0.2)


@dataclass(frozen=True)
class Lists:
    """Lists of one split: `nbest` and `scores` have N entries an utterance; `domains` names each one's domain."""

    nbest: list[list[str]]
    references: list[str]
    scores: list[list[float]]
    domains: list[str]

    def __len__(self) -> int:
        return len(self.references)

    def rows_of(self, domain: str) -> list[int]:
        """Places of a domain's utterances."""
        return [row for row, name in enumerate(self.domains) if name == domain]


@dataclass(frozen=True)
class Prepared:
    """What `prepare` left, read when asked for."""

    folder: Path
    index: dict[str, Any]

    @cached_property
    def lists(self) -> dict[str, Lists]:
        from datasets import load_from_disk

        out = {}
        for split in SPLITS:
            rows = load_from_disk(str(self.folder / "lists" / split))
            out[split] = Lists(rows["nbest"][:], rows["reference"][:], rows["scores"][:], rows["domain"][:])
        return out

    @cached_property
    def sentences(self) -> list[str]:
        return (self.folder / "text.txt").read_text(encoding="utf-8").splitlines()

    @cached_property
    def tokenizer(self) -> BytePairTokenizer:
        return BytePairTokenizer.load(self.folder / "tokenizer.json")

    def vocabulary(self, size: int) -> WordVocabulary:
        """The `size` most frequent words of the training lists."""
        words = (self.folder / "words.txt").read_text(encoding="utf-8").splitlines()
        return WordVocabulary(words[:size])

    @property
    def domains(self) -> list[str]:
        return self.index["domains"]

    @property
    def digest(self) -> str:
        return self.index["digest"]


def load(folder: Path) -> Prepared:
    """Read what `prepare` wrote; `UserError` where it is missing or damaged."""
    try:
        return Prepared(folder, json.loads((folder / "index.json").read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise UserError(f"{folder} is not prepared: run the stage prepare first (dvc repro)") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{folder / 'index.json'} is damaged ({error}): run the stage prepare again") from None


def prepare(stage: Stage[Params]) -> None:
    """Generate or read the lists of all domains, split them, and make vocabularies and the text to pretrain on."""
    from datasets import disable_progress_bars

    disable_progress_bars()
    params, folder = stage.params, stage.data_dir
    real = {
        name: read_domain(domain, params) for name, domain in params.domains.items() if isinstance(domain, Recorded)
    }
    generated = [name for name in params.domains if name not in real]
    general = _general_text(params, real) if generated else []
    parts: dict[str, list[datasets.Dataset]] = {split: [] for split in SPLITS}
    for name, domain in params.domains.items():
        splits = simulate(domain, general, params) if isinstance(domain, Simulated) else real[name]
        for split in SPLITS:
            parts[split].append(splits[split].add_column("domain", [name] * len(splits[split])))
    digest = _save_lists(folder, parts)
    train = parts["train"]
    texts = [each for rows in train for hypotheses in rows["nbest"] for each in hypotheses]
    texts += [each for rows in train for each in rows["reference"]]
    counts = Counter(word for each in texts for word in each.split())
    write_text(folder / "words.txt", "".join(f"{word}\n" for word in sorted(counts, key=lambda w: (-counts[w], w))))
    if params.decoder_only is not None:
        sentences = general if params.pretraining_text == params.general_text and general else None
        sentences = sentences or _read_text(params.pretraining_text, params.max_sentences)
        write_text(folder / "text.txt", "".join(f"{sentence}\n" for sentence in sentences))
        # A part of the text is enough for its frequent pairs.
        learned = "\n".join(f" {each}" for each in [*sentences[:20_000], *dict.fromkeys(texts)])
        BytePairTokenizer.train(learned, params.decoder_only.vocabulary_size).save(folder / "tokenizer.json")
        digest = hashlib.sha256(
            f"{digest}{len(sentences)}{(folder / 'tokenizer.json').read_text()}".encode()
        ).hexdigest()
    sources = [f"real: HyPoradise-v0 ({', '.join(real)})"] if real else []
    sources += [f"generated: {', '.join(generated)}, heard by a simulated recognizer"] if generated else []
    write_json(folder / "index.json", {"domains": list(params.domains), "source": "; ".join(sources), "digest": digest})


def simulate(domain: Simulated, general: list[str], params: Params) -> dict[str, datasets.Dataset]:
    """Generated lists by split, the sentences of all cores heard side by side."""
    sizes = {split: getattr(domain, split) for split in SPLITS}
    sentences = grammar.generate(sizes, params.seed).texts
    everything = [sentence for split in SPLITS for sentence in sentences[split]]
    # The parts are as many wherever this runs, so that the noise is the same.
    num_parts = min(2, len(everything))
    jobs = [
        Job(f"recognizer, part {part}", _hear, (domain, general, everything[part::num_parts], params, part))
        for part in range(num_parts)
    ]
    heard = run_jobs(jobs, workers=params.workers, threads=params.threads)
    nbest: list[list[str]] = [[]] * len(everything)
    scores: list[list[float]] = [[]] * len(everything)
    for part, (texts, values) in enumerate(heard):
        nbest[part::num_parts], scores[part::num_parts] = texts, values
    splits, start = {}, 0
    for split in SPLITS:
        rows = slice(start, start + sizes[split])
        splits[split] = make_nbest(
            nbest[rows], sentences[split], scores[rows], num_hypotheses=params.num_hypotheses, seed=params.seed
        )
        start += sizes[split]
    return splits


def _hear(
    domain: Simulated, general: list[str], sentences: list[str], params: Params, part: int, report: Report
) -> tuple[list[list[str]], list[list[float]]]:
    from .simulator import Recognizer

    recognizer = Recognizer(general, grammar.vocabulary(), domain.recognizer)
    report(0.3, "")
    lists = recognizer.recognize(sentences, params.seed + 1000 * part, num_hypotheses=params.num_hypotheses)
    return lists.nbest, lists.scores


def read_domain(domain: Recorded, params: Params) -> dict[str, datasets.Dataset]:
    """Real lists by split."""
    folder = data_root() / domain.folder
    options = {"num_hypotheses": params.num_hypotheses, "seed": params.seed}
    if domain.lists is not None:
        return _with_scores(dict(split_nbest(_read(folder / domain.lists, options), FRACTIONS, seed=params.seed)))
    train = _read(folder / str(domain.train), options)
    if len(train) <= domain.held_out:
        raise UserError(f"{domain.train} has {len(train)} lists, of which {domain.held_out} cannot be held out")
    divided = train.train_test_split(domain.held_out, seed=42)
    test = _read(folder / str(domain.test), options)
    return _with_scores({"train": divided["train"], "validation": divided["test"], "test": test})


def _read(path: Path, options: dict[str, int]) -> datasets.Dataset:
    packed = path.with_name(path.name + ".gz")
    if not path.is_file() and not packed.is_file():
        raise UserError(
            f"{path} is missing: put the lists of HyPoradise-v0 there (see the data sources in paper.yaml), or point "
            "REPRISE_DATA to the folder that holds your data sets. The profile small needs no files"
        )
    return read_nbest(path if path.is_file() else packed, **options)


def _with_scores(splits: dict[str, datasets.Dataset]) -> dict[str, datasets.Dataset]:
    """With a score of 0 for every hypothesis where there are none."""
    return {
        name: rows
        if "scores" in rows.column_names
        else rows.add_column("scores", [[0.0] * len(n) for n in rows["nbest"]])
        for name, rows in splits.items()
    }


def _general_text(params: Params, real: dict[str, dict[str, datasets.Dataset]]) -> list[str]:
    if params.general_text != "references":
        return _read_text(params.general_text, params.max_sentences)
    # Of training lists alone: a corrector that is trained on generated lists must not read test transcripts in them.
    return [reference for splits in real.values() for reference in splits["train"]["reference"]]


def _read_text(name: str, most: int | None) -> list[str]:
    return text.books(most) if name == "books" else text.documentation(most)


def _save_lists(folder: Path, parts: dict[str, list[datasets.Dataset]]) -> str:
    """Write the lists of all splits and return a digest of what they say."""
    from datasets import concatenate_datasets

    digest = hashlib.sha256()
    for split, rows in parts.items():
        joined = concatenate_datasets(
            [each.select_columns(["nbest", "reference", "scores", "domain"]) for each in rows]
        )
        joined.save_to_disk(str(folder / "lists" / split))
        for line in _lines(joined):
            digest.update(line.encode())
    return digest.hexdigest()


def _lines(rows: datasets.Dataset) -> Iterable[str]:
    for nbest, reference, domain in zip(rows["nbest"], rows["reference"], rows["domain"], strict=True):
        yield f"{domain}\t{reference}\t" + "\t".join(nbest) + "\n"
