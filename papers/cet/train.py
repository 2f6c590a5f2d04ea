"""Trains the models of one family: R, and S where there are weights, of all folds and seeds."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from shared.config import Stage, UserError
from shared.evaluation.scores import code_digest
from shared.files import write_json
from shared.tracking import start_run
from shared.training import Diverged, Job, run_jobs
from shared.training.checkpoint import load_tensors, pack_optimizer, save_tensors, unpack_optimizer
from shared.training.loop import MetricLog
from shared.training.parallel import Report

from . import data
from .config import FAMILIES, CoupledTraining, Experiment, KernelRanker, Params, Source, Variant, family_of
from .data import Prepared
from .diagnosis import Diagnosis, score_slots
from .features import NUM_FEATURES, FeatureInputs, TokenInputs
from .model import Inputs, KernelNetwork, Models, accumulate_gradients, build_cross_encoder, parameter_groups
from .sampling import Member, Sampler, seed_of, usable

TRAINING_CODE = ("model.py", "train.py", "sampling.py", "diagnosis.py", "features.py")


def train(stage: Stage[Params]) -> None:
    """Train the family `stage.model`, or one variant of it; weights to runs/<family>/<experiment>/<model>/…."""
    used = {variant for experiment in stage.params.experiments.values() for variant in experiment.models}
    if stage.model not in (*FAMILIES, *used):
        raise UserError(
            f"train needs a family or a variant of the profile, such as --model coupled; choose one of "
            f"{', '.join([*FAMILIES, *sorted(used)])} (given: {stage.model})"
        )
    jobs = [
        Job(f"{model}, {name}{_label(members)}", train_members, (stage, name, model, members))
        for name, experiment in stage.params.experiments.items()
        for model in experiment.trained()
        if stage.model in (variant_of(experiment, model), family_of(variant_of(experiment, model)))
        for members in member_groups(stage.params)
    ]
    # On a GPU one process trains one network after the other; on CPU each core has one.
    workers = 1 if torch.cuda.is_available() else stage.params.workers
    losses = run_jobs(jobs, workers=workers, threads=stage.params.threads) if jobs else []
    family = stage.model if stage.model in FAMILIES else family_of(str(stage.model))
    summary = {job.label: loss for job, loss in zip(jobs, losses, strict=True)}
    write_json(stage.runs_dir / family / "summary.json", {"loss_of_last_epoch": summary})


def variant_of(experiment: Experiment, model: str) -> str:
    """The variant's name in that of a model, `<variant>_<source>`."""
    return model.removesuffix(f"_{experiment.trained()[model][1]}")


def member_groups(params: Params) -> list[tuple[Member, ...]]:
    """Folds and seeds that are trained together: all of a kernel ranker's, one by one of a transformer's."""
    folds = params.pooling.tested_folds or params.pooling.folds
    members = tuple(Member(fold, seed) for seed in params.seeds for fold in range(folds))
    return [members] if isinstance(params.ranker, KernelRanker) else [(member,) for member in members]


def run_folder(stage: Stage[Params], experiment: str, model: str, members: Sequence[Member]) -> Path:
    """Where the weights of one training lie."""
    variant = variant_of(stage.params.experiments[experiment], model)
    folder = stage.runs_dir / family_of(variant) / experiment / model
    return folder if len(members) > 1 else folder / f"fold{members[0].fold}_seed{members[0].seed}"


def make_network(params: Params, prepared: Prepared, role: str, members: Sequence[Member]) -> nn.Module:
    """A ranker in the role `relevance` or `selection`, drawn from the members' seeds and the role."""
    ranker, training = params.ranker, params.training
    seeds = [seed_of(role, member.seed) for member in members]
    if isinstance(ranker, KernelRanker):
        return KernelNetwork(NUM_FEATURES, ranker.hidden_size, ranker.dropout, seeds)
    autocast = training.precision == "bf16-mixed"
    return build_cross_encoder(ranker, prepared.attrs["vocab_size"], seeds[0], autocast=autocast)


def make_inputs(params: Params, prepared: Prepared, device: torch.device) -> Inputs:
    """What the profile's ranker is given of queries and slots, kept on the device."""

    def tensor(array: NDArray) -> Tensor:
        return torch.from_numpy(np.array(array)).to(device)

    if isinstance(params.ranker, KernelRanker):
        return FeatureInputs(tensor(prepared.features))
    parts = (prepared.query_tokens, prepared.document_tokens, prepared.documents)
    return TokenInputs(*map(tensor, parts), cls=prepared.attrs["cls"], sep=prepared.attrs["sep"])


def train_members(stage: Stage[Params], name: str, model: str, members: Sequence[Member], report: Report) -> float:
    """Train one model of some folds and seeds and return the loss of its last epoch."""
    params = stage.params
    experiment = params.experiments[name]
    variant, source = experiment.trained()[model]
    prepared = data.load(stage.data_dir)
    settings = params.model_dump(mode="json", include={"ranker", "training", "pooling"})
    settings |= {"labels": experiment.labels, "variant": variant.model_dump(mode="json"), "source": source}
    identity = json.dumps(
        [
            settings,
            [str(member) for member in members],
            prepared.attrs["digest"],
            code_digest(stage.folder, TRAINING_CODE),
        ]
    )
    directory = run_folder(stage, name, model, members)
    with start_run(
        stage.slug,
        f"{model} · {name}{_label(members)}",
        parent=stage.run.id if stage.run else None,
        params=settings | {"members": len(members)},
        tags={"model": model, "experiment": name, "profile": stage.profile},
    ) as run:
        run.log_dataset(name, prepared.attrs["digest"], source=prepared.attrs["source"], context="train")
        write_json(directory / "run.json", {"run_id": run.id})
        return fit_models(
            params, prepared, experiment.labels, source, variant, members, directory, identity, run, report
        )


def fit_models(
    params: Params,
    prepared: Prepared,
    labels: str,
    source: Source,
    variant: Variant,
    members: Sequence[Member],
    directory: Path,
    identity: str,
    track: MetricLog | None = None,
    report: Report | None = None,
) -> float:
    """The first round, where the variant has one, then the models themselves; returns the last epoch's loss of R."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    inputs = make_inputs(params, prepared, device)
    relevance, selection = (
        make_network(params, prepared, role, members).to(device) for role in ("relevance", "selection")
    )
    dropped = judge = None
    if variant.has_first_round:
        # Unweighted, from the weights that the model of this role would start with.
        role = "selection" if variant.weights == "fixed_selection" else "relevance"
        first = make_network(params, prepared, role, members).to(device)
        sampler = Sampler(prepared, labels, source, Variant(), params.training, members)
        where, what = directory / "first_round", json.dumps(["first round", role, identity])
        fit(Models(first), sampler, inputs, Variant(), params.training, where, what, report=report)
        if variant.weights == "fixed_selection":
            selection = first
        elif variant.weights == "fixed_relevance":
            judge = first
        else:
            dropped = scored_high(first, prepared, labels, source, variant, inputs)
    if variant.weights == "coupled":
        judge = relevance
    models = Models(relevance, selection if variant.has_selection else None, judge)
    sampler = Sampler(prepared, labels, source, variant, params.training, members, dropped)
    unlabeled = usable(prepared, labels, source)
    diagnosis = Diagnosis(prepared, unlabeled, source, sampler.queries, params.training.diagnosed_queries)
    return fit(
        models,
        sampler,
        inputs,
        variant,
        params.training,
        directory,
        identity,
        diagnosis=diagnosis,
        track=track,
        report=report,
    )


def scored_high(
    model: nn.Module, prepared: Prepared, labels: str, source: Source, variant: Variant, inputs: Inputs
) -> NDArray[np.bool_]:
    """Negatives that a model scores higher than the (best) label by more than a threshold, [members, Q, negatives].

    σ(f(q, d-) - f(q, d+)) > threshold: only differences of scores are trained, so that a threshold of one score alone
    would mean nothing.
    """
    negatives = score_slots(model, inputs, prepared.sources[source])
    positives = score_slots(model, inputs, prepared.labels[labels]).max(axis=2, keepdims=True)
    with np.errstate(invalid="ignore", over="ignore"):
        return 1 / (1 + np.exp(positives - negatives)) > variant.threshold


@dataclass
class _Progress:
    """What a checkpoint carries besides weights and optimizers; `sums` are the losses of the epoch under way."""

    step: int = 0
    seconds: float = 0.0
    sums: dict[str, list[float]] = field(default_factory=dict)
    history: dict[str, list[list[float]]] = field(default_factory=dict)


def fit(
    models: Models,
    sampler: Sampler,
    inputs: Inputs,
    variant: Variant,
    settings: CoupledTraining,
    directory: Path,
    identity: str,
    *,
    diagnosis: Diagnosis | None = None,
    track: MetricLog | None = None,
    report: Report | None = None,
) -> float:
    """The algorithm, in place: in every step weigh, take both losses and their clipped gradients, update both models.

    Leaves weights and the history of losses and diagnoses, one value an epoch and member, in `final.safetensors`. A run
    that was interrupted continues from its last checkpoint to the same numbers, and a finished one is not repeated: its
    weights are loaded. Returns the mean loss of R in the last epoch. Raises `Diverged` if a loss stops being finite.
    """
    networks = dict(zip(("relevance", "selection"), models.trained(), strict=False))
    final, last = directory / "final.safetensors", directory / "last.safetensors"
    optimizers = {
        role: torch.optim.AdamW(
            parameter_groups(network, settings.weight_decay),
            lr=settings.learning_rate,
            eps=settings.epsilon,
            fused=True,
        )
        for role, network in networks.items()
    }
    progress = _restore(final, identity, networks, {}) or _restore(last, identity, networks, optimizers) or _Progress()
    started = time.perf_counter() - progress.seconds
    device = next(models.relevance.parameters()).device
    num_steps = settings.epochs * sampler.steps
    sums = {role: torch.tensor(values, device=device) for role, values in progress.sums.items()}
    pairs = None
    for step in range(progress.step, num_steps):
        epoch, place = divmod(step, sampler.steps)
        if pairs is None or place == 0:
            pairs = sampler.epoch(epoch).to(device)
        batch = pairs.step(place, single=not hasattr(models.relevance, "members"))
        _seed_dropout(sampler.members, step)
        losses = accumulate_gradients(models, batch, inputs, variant, settings.gradient_clip)
        for role, optimizer in optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate_at(step, num_steps)
            optimizer.step()
            optimizer.zero_grad()
            loss = losses[role].reshape(-1)
            sums[role] = loss if place == 0 else sums[role] + loss
        if place == sampler.steps - 1:
            row = {f"loss/{role}": (total / sampler.steps).tolist() for role, total in sums.items()}
            _check(row, epoch, last)
            row |= diagnosis(models, inputs, variant) if diagnosis else {}
            _record(row, epoch, progress.history, track)
            if report:
                report((step + 1) / num_steps, f"loss {np.mean(row['loss/relevance']):.4g}")
        every = settings.checkpoint_every_steps
        if every and (step + 1) % every == 0 and step + 1 < num_steps:
            progress.step, progress.seconds = step + 1, time.perf_counter() - started
            progress.sums = {role: total.tolist() for role, total in sums.items()}
            _save(last, identity, networks, optimizers, progress)
    if progress.step < num_steps:
        progress.step, progress.seconds, progress.sums = num_steps, time.perf_counter() - started, {}
        _save(final, identity, networks, {}, progress)
        last.unlink(missing_ok=True)
    return float(np.mean(progress.history["loss/relevance"][-1]))


def _seed_dropout(members: Sequence[Member], step: int) -> None:
    value = seed_of("dropout", *(member.seed for member in members), step)
    if torch.accelerator.is_available():
        torch.manual_seed(value)
    else:
        # torch.manual_seed would also leave word for a GPU that is not there, which takes longer than a small step.
        torch.default_generator.manual_seed(value)


def _check(row: dict[str, list[float]], epoch: int, last: Path) -> None:
    for name, values in row.items():
        if not np.isfinite(values).all():
            kept = f"the last good checkpoint is {last}" if last.exists() else "no checkpoint was written before"
            raise Diverged(
                f"{name} became {values[int(np.argmin(np.isfinite(values)))]} in epoch {epoch}; {kept}. Lower "
                "learning_rate in params.yaml, or raise the temperature of the weights"
            )


def _record(
    row: dict[str, list[float]], epoch: int, history: dict[str, list[list[float]]], track: MetricLog | None
) -> None:
    for name, values in row.items():
        history.setdefault(name, []).append(values)
    if track is not None:
        means = {f"train/{name}": float(np.mean(values)) for name, values in row.items()}
        track.log({name: value for name, value in means.items() if np.isfinite(value)}, step=epoch + 1)


def _save(
    path: Path,
    identity: str,
    networks: dict[str, nn.Module],
    optimizers: dict[str, torch.optim.Optimizer],
    progress: _Progress,
) -> None:
    tensors: dict[str, Tensor] = {}
    note: dict[str, Any] = {"identity": identity, "progress": asdict(progress), "optimizers": {}}
    for role, network in networks.items():
        tensors |= {f"{role}.{name}": tensor for name, tensor in network.state_dict().items()}
    for role, optimizer in optimizers.items():
        packed, note["optimizers"][role] = pack_optimizer(optimizer.state_dict())
        tensors |= {f"optimizer.{role}.{name}": tensor for name, tensor in packed.items()}
    save_tensors(path, tensors, note)


def _restore(
    path: Path, identity: str, networks: dict[str, nn.Module], optimizers: dict[str, torch.optim.Optimizer]
) -> _Progress | None:
    """Load what a run of the same identity left at `path`; None where there is nothing, or a file of another run."""
    if not path.exists():
        return None
    tensors, note = load_tensors(path)
    if note.get("identity") != identity:
        return None
    for role, network in networks.items():
        network.load_state_dict(_under(tensors, f"{role}."))
    for role, optimizer in optimizers.items():
        state = unpack_optimizer(_under(tensors, f"optimizer.{role}."), note["optimizers"][role], named=False)
        optimizer.load_state_dict(state)
    return _Progress(**note["progress"])


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


@dataclass(frozen=True)
class Trained:
    """The ranker of a finished training, and its history: one list an epoch, one value a member."""

    relevance: nn.Module
    history: dict[str, list[list[float]]]
    seconds: float


def load_trained(stage: Stage[Params], prepared: Prepared, name: str, model: str, members: Sequence[Member]) -> Trained:
    """Read a finished training; `UserError` where it is missing, damaged, or of other params."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    path = run_folder(stage, name, model, members) / "final.safetensors"
    tensors, note = load_tensors(path)
    network = make_network(stage.params, prepared, "relevance", members).to(device)
    try:
        network.load_state_dict(_under(tensors, "relevance."))
        progress = _Progress(**note["progress"])
    except (RuntimeError, KeyError, TypeError) as error:
        raise UserError(f"{path} does not fit (trained with other params?): run the training again ({error})") from None
    return Trained(network, progress.history, progress.seconds)


def _label(members: Sequence[Member]) -> str:
    if len(members) > 1:
        return f", {len(members)} folds and seeds"
    return f", fold {members[0].fold}, seed {members[0].seed}"
