"""Trains one house model: a mixture, a size, a seed. What it leaves in the model's folder is a function of these alone.

config.json vocab.json model.safetensors   the model, as `HouseModel.load` reads it
checkpoints/<step>/                        the same, at the steps that the mixture names
training.json                              recipe, source of the data, steps, losses
gates.csv                                  what the model can do (`shared.evaluation.abilities`)
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from pipelines.house_lm.config import Mixture, Params, check_size
from shared.config import UserError, validate
from shared.data.house_corpora import make_stream, pack
from shared.data.house_lexicon import load_lexicon
from shared.data.house_text import load_words
from shared.evaluation.abilities import measure
from shared.evaluation.scores import code_digest
from shared.files import remove_unfinished, write_json
from shared.lm.model import HouseConfig, HouseModel
from shared.training.checkpoint import load_tensors, pack_optimizer, save_tensors, unpack_optimizer
from shared.training.loop import Diverged
from shared.training.parallel import Report

BETAS = (0.9, 0.95)
STEPS_PER_CHUNK = 50
WAIT_STEPS = 50
WAIT_DOCUMENTS = 100
WAIT_SEED = 2**32 - 1
LOG_EVERY = 20
# The code that weights depend on: trainings by other code are neither continued nor taken for finished.
CODE = {
    "documents": ("shared/data/house_corpora.py", "shared/data/house_lexicon.py"),
    "text": ("shared/data/house_corpora.py", "shared/data/house_text.py"),
}
CODE_OF_ALL = ("pipelines/house_lm/train.py", "shared/lm/model.py")


@dataclass(frozen=True)
class Corpus:
    """What a mixture is trained on: `chunk(index)` gives the windows of 50 steps, [50·B, length + 1] int64."""

    vocabulary: tuple[str, ...]
    source: str
    chunk: Callable[[int], Tensor]


@dataclass
class Progress:
    """What a checkpoint carries beside weights and optimizer."""

    step: int = 0
    decays_from: int | None = None
    losses: list[tuple[int, float]] = field(default_factory=list)
    waiting: list[tuple[int, float]] = field(default_factory=list)


def train(
    params: Params,
    name: str,
    size: str,
    seed: int,
    models: Path,
    *,
    track: Any = None,
    report: Report | None = None,
) -> Path:
    """Train a model into `models/<name>/<size>/seed<seed>` and return that folder.

    Goes on where a killed training was, to the same numbers; a finished one is not repeated. `UserError` where the
    parent is missing, `Diverged` where the loss stops being finite.
    """
    mixture = params.mixture(name)
    check_size(size)
    folder = model_folder(models, name, size, seed)
    parent = model_folder(models, mixture.parent, size, seed) if mixture.parent else None
    if parent and not (parent / "training.json").is_file():
        raise UserError(
            f"{name} goes on from {mixture.parent}, and {parent} holds no trained model: train it first (reprise "
            f"house-lm train --mixture {mixture.parent} --size {size} --seed {seed}), or let DVC do both"
        )
    folder.mkdir(parents=True, exist_ok=True)
    remove_unfinished(folder)
    corpus = make_corpus(mixture, name, seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    identity = _identity(mixture, size, seed, parent, corpus)
    if not _finished(folder, identity):
        # Until the new one is there, nothing must take an older model in this folder for it.
        (folder / "training.json").unlink(missing_ok=True)
        model = _new_model(mixture, size, seed, parent, corpus).to(device)
        progress = _fit(model, mixture, params, corpus, folder, identity, track, report)
        _finish(model, mixture, corpus, folder, identity, progress)
    return folder


def model_folder(models: Path, name: str, size: str, seed: int) -> Path:
    return models / name / size / f"seed{seed}"


# ---------------------------------------------------------------------------------------------------------------- data


def make_corpus(mixture: Mixture, name: str, seed: int) -> Corpus:
    """The training data of a mixture and seed; no two chunks, seeds or mixtures share random numbers."""
    windows = STEPS_PER_CHUNK * mixture.batch_size
    data = mixture.data
    if data.kind == "documents":
        lexicon = load_lexicon(data.lexicon)

        def generated(index: int) -> Tensor:
            rng = make_stream(seed, "train", name, index)
            return torch.from_numpy(pack(data.weights, windows, mixture.length, rng, lexicon)).long()

        return Corpus(lexicon.vocabulary, lexicon.source, generated)
    words = load_words(data.corpus, data.vocab_size)
    if len(words.train) <= mixture.length:
        raise UserError(f"the text {data.corpus!r} has {len(words.train)} tokens, fewer than one window")
    stream = torch.from_numpy(words.train).long().unfold(0, mixture.length + 1, 1)

    def cut(index: int) -> Tensor:
        rng = make_stream(seed, "train", name, index)
        return stream[torch.from_numpy(rng.integers(len(stream), size=windows))]

    return Corpus(words.vocabulary, words.source, cut)


def _batches(corpus: Corpus, mixture: Mixture, first: int, device: torch.device) -> Iterator[tuple[int, Tensor]]:
    """(step, windows) from step `first` on: the batch of a step is a function of seed and step."""
    for index in range(first // STEPS_PER_CHUNK, math.ceil(mixture.steps / STEPS_PER_CHUNK)):
        chunk = corpus.chunk(index).to(device)
        for place, batch in enumerate(chunk.split(mixture.batch_size)):
            step = index * STEPS_PER_CHUNK + place
            if first <= step < mixture.steps:
                yield step, batch


# ------------------------------------------------------------------------------------------------------------ training


def _new_model(mixture: Mixture, size: str, seed: int, parent: Path | None, corpus: Corpus) -> HouseModel:
    if parent:
        model = HouseModel.load(parent)
        longest = max(model.config.max_length, mixture.length)
        changes = {"rotary_base": model.config.rotary_base * mixture.rotary_factor, "max_length": longest}
        continued = HouseModel(validate(HouseConfig, model.config.model_dump() | changes, "the continued model"))
        continued.load_state_dict(model.state_dict())
        return continued
    torch.manual_seed(seed)
    return HouseModel(HouseConfig.of_size(size, len(corpus.vocabulary), **mixture.network))


def make_optimizer(model: HouseModel, mixture: Mixture) -> torch.optim.Optimizer:
    """AdamW, with weight decay on matrices only."""
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": mixture.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=mixture.learning_rate, betas=BETAS, fused=True)


def learning_rate(mixture: Mixture, step: int, decays_from: int | None) -> float:
    """Linear warm-up, full rate, and from step `decays_from` on a half cosine down to `final_fraction` of it."""
    rate, low = mixture.learning_rate, mixture.final_fraction
    if step < mixture.warmup_steps:
        return rate * (step + 1) / mixture.warmup_steps
    if decays_from is None:
        return rate
    progress = (step - decays_from) / (_last_step(mixture, decays_from) - decays_from)
    return rate * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * progress)))


def _last_step(mixture: Mixture, decays_from: int | None) -> int:
    """The number of steps in all, as far as it is known."""
    return mixture.steps if decays_from is None or not mixture.until else decays_from + mixture.decay_steps


def training_step(model: HouseModel, optimizer: torch.optim.Optimizer, batch: Tensor, clip: float) -> Tensor:
    """One update by the mean next-token cross-entropy of windows [B, length + 1]; returns the loss."""
    logits = model(batch[:, :-1])
    loss = functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def _fit(
    model: HouseModel,
    mixture: Mixture,
    params: Params,
    corpus: Corpus,
    folder: Path,
    identity: str,
    track: Any,
    report: Report | None,
) -> Progress:
    """Train in place, keeping the checkpoints that the mixture names and one to go on from."""
    optimizer = make_optimizer(model, mixture)
    progress = _resume(model, optimizer, folder / "last.safetensors", identity)
    if progress.step == 0:
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    device = next(model.parameters()).device
    for step, batch in _batches(corpus, mixture, progress.step, device):
        if step in mixture.checkpoints:
            model.save(folder / "checkpoints" / str(step), corpus.vocabulary)
        if progress.decays_from is None and _should_decay(model, mixture, step, progress, track):
            progress.decays_from = step
        if step >= _last_step(mixture, progress.decays_from):
            break
        rate = learning_rate(mixture, step, progress.decays_from)
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = training_step(model, optimizer, batch, mixture.gradient_clip)
        progress.step = step + 1
        if progress.step % LOG_EVERY == 0 or progress.step == mixture.steps:
            progress.losses.append((progress.step, _checked(loss.item(), step, folder)))
            if track is not None:
                track.log({"train/loss": loss.item(), "train/learning_rate": rate}, step=progress.step)
            if report:
                report(progress.step / mixture.steps, f"step {progress.step}, loss {loss.item():.3f}")
        if progress.step % params.save_every_steps == 0:
            _checked(loss.item(), step, folder)
            _save(model, optimizer, folder / "last.safetensors", identity, progress)
    return progress


def _should_decay(model: HouseModel, mixture: Mixture, step: int, progress: Progress, track: Any) -> bool:
    """Whether the learning rate begins to fall: the ability that is waited for is there, or few steps are left."""
    if mixture.until is None:
        return step >= mixture.warmup_steps
    if step and step % WAIT_STEPS == 0:
        accuracy = waited_for(model, mixture)
        progress.waiting.append((step, accuracy))
        if track is not None:
            track.log({f"train/{mixture.until.ability}": accuracy}, step=step)
        if accuracy >= mixture.until.accuracy:
            return True
    return step >= mixture.steps - mixture.decay_steps


def waited_for(model: HouseModel, mixture: Mixture) -> float:
    """Accuracy of the ability that training waits for, on documents that serve for this and nothing else."""
    lexicon = load_lexicon(mixture.data.lexicon)  # documents, as the params were checked for
    return measure(model, mixture.until.ability, lexicon, count=WAIT_DOCUMENTS, seed=WAIT_SEED)["accuracy"]


def _checked(loss: float, step: int, folder: Path) -> float:
    if not math.isfinite(loss):
        last = folder / "last.safetensors"
        kept = f"the last good checkpoint is {last}" if last.exists() else "no checkpoint was written before"
        raise Diverged(f"the loss became {loss} in step {step}; {kept}. Lower learning_rate in params.yaml")
    return loss


# --------------------------------------------------------------------------------------------------------- checkpoints


def _save(model: HouseModel, optimizer: torch.optim.Optimizer, path: Path, identity: str, progress: Progress) -> None:
    tensors, rest = pack_optimizer(optimizer.state_dict())
    everything = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    everything |= {f"optimizer.{name}": tensor for name, tensor in tensors.items()}
    save_tensors(path, everything, {"identity": identity, "progress": asdict(progress), "optimizer": rest})


def _resume(model: HouseModel, optimizer: torch.optim.Optimizer, path: Path, identity: str) -> Progress:
    """Progress of an earlier training of the same identity, whose weights and optimizer are loaded; else a new one."""
    if not path.exists():
        return Progress()
    tensors, note = load_tensors(path)
    if note.get("identity") != identity:
        path.unlink()
        return Progress()
    parts: dict[str, dict[str, Tensor]] = {"model": {}, "optimizer": {}}
    for name, tensor in tensors.items():
        part, _, rest = name.partition(".")
        parts[part][rest] = tensor
    model.load_state_dict(parts["model"])
    optimizer.load_state_dict(unpack_optimizer(parts["optimizer"], note["optimizer"], named=False))
    progress = Progress(**note["progress"])
    progress.losses = [(int(step), float(loss)) for step, loss in progress.losses]
    progress.waiting = [(int(step), float(value)) for step, value in progress.waiting]
    return progress


def _finish(
    model: HouseModel, mixture: Mixture, corpus: Corpus, folder: Path, identity: str, progress: Progress
) -> None:
    model.save(folder, corpus.vocabulary)
    write_json(
        folder / "training.json",
        {
            "identity": identity,
            "source": corpus.source,
            "steps": progress.step,
            "tokens": progress.step * mixture.batch_size * mixture.length,
            "parameters": model.num_parameters(),
            "losses": progress.losses,
            "decays_from": progress.decays_from,
            "waiting": progress.waiting,
            "recipe": mixture.model_dump(mode="json"),
        },
    )
    (folder / "last.safetensors").unlink(missing_ok=True)


def _finished(folder: Path, identity: str) -> bool:
    try:
        return json.loads((folder / "training.json").read_text(encoding="utf-8"))["identity"] == identity
    except (FileNotFoundError, json.JSONDecodeError, KeyError):
        return False


def _identity(mixture: Mixture, size: str, seed: int, parent: Path | None, corpus: Corpus) -> str:
    """A digest of all that the weights depend on; which abilities are tested is not among it."""
    recipe = mixture.model_dump(mode="json", exclude={"abilities"})
    root = Path(__file__).parents[2]
    modules = [root / name for name in (*CODE_OF_ALL, *CODE[mixture.data.kind])]
    code = [code_digest(path.parent, [path.name]) for path in modules]
    before = hashlib.sha256((parent / "model.safetensors").read_bytes()).hexdigest() if parent else None
    text = json.dumps([recipe, size, seed, before, corpus.vocabulary, code], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
