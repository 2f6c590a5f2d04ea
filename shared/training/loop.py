"""The training loop of the house, on Lightning Fabric: one process or many, CPU or GPU, resumable to the last digit."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from lightning_fabric import Fabric
from lightning_fabric.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from shared.config import UserError
from shared.files import write_json
from shared.training.checkpoint import load_tensors, pack_optimizer, save_tensors, unpack_optimizer
from shared.training.settings import TrainingSettings

Batch = tuple[Tensor, ...]


@dataclass(frozen=True)
class Moment:
    """Where a training run stands when a loss is computed."""

    epoch: int
    step: int
    epochs: int
    steps_per_epoch: int


Loss = Callable[[nn.Module, Batch, Moment], Mapping[str, Tensor]]
Validation = Callable[[nn.Module], Mapping[str, float]]
Report = Callable[[float, str], None]


class MetricLog(Protocol):
    """What the loop needs of a tracked run."""

    id: str

    def log(self, metrics: Mapping[str, float], step: int) -> None: ...


class Diverged(UserError):
    """The loss became infinite or not a number."""


@dataclass
class FitResult:
    """What a training run came to; `history` has one row an epoch."""

    epochs: int
    best_epoch: int
    best_value: float | None
    seconds: float
    history: list[dict[str, float]] = field(default_factory=list)


def make_fabric(settings: TrainingSettings | None = None, **options: Any) -> Fabric:
    """A Fabric for this machine: one GPU if there is one, else the CPU; `fabric run` or torchrun choose more.

    Under `fabric run` (or torchrun) the launcher's own choice of accelerator, strategy, devices and precision holds.
    """
    if os.environ.get("LT_CLI_USED") != "1":
        options.setdefault("precision", settings.precision if settings else "32-true")
        options.setdefault("devices", int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
        options.setdefault("num_nodes", int(os.environ.get("GROUP_WORLD_SIZE", 1)))
    if options.get("devices", 1) != 1:
        # A warm-up may train a part of the model only, which plain DDP takes for an error.
        options.setdefault("strategy", DDPStrategy(find_unused_parameters=True))
    fabric = Fabric(**options)
    if os.environ.get("LT_CLI_USED") != "1":
        # `fabric run` has started the processes already, and refuses a second launch.
        fabric.launch()
    return fabric


def fit(
    model: nn.Module,
    data: TensorDataset | Dataset,
    loss: Loss,
    settings: TrainingSettings,
    *,
    directory: Path,
    seed: int,
    fingerprint: str = "",
    validate: Validation | None = None,
    monitor: str = "validation/loss",
    track: MetricLog | None = None,
    report: Report | None = None,
    fabric: Fabric | None = None,
    num_workers: int = 0,
) -> FitResult:
    """Train `model` in place, leave it at its best validated weights, and keep them in `directory/best.safetensors`.

    `loss(model, batch, moment)` returns named scalars, of which `loss` is minimized. `validate(model)` returns named
    numbers, of which `monitor` (lower is better) picks the best epoch; without it the last epoch is kept.

    The run writes `directory/last.safetensors` as it goes and continues from it after any interruption, SIGKILL
    included, to the same numbers as an uninterrupted run: data order and randomness are functions of `seed` and the
    step alone. A checkpoint whose `fingerprint` (params, data, code) or settings differ is not continued.
    A finished run is not repeated. Raises `Diverged` if the loss stops being finite.

    `track` gets a row an epoch, those of before an interruption too; its id is kept in `directory/run.json`, so that
    an evaluation can add to the run.
    """
    fabric = fabric or make_fabric(settings)
    directory.mkdir(parents=True, exist_ok=True)
    size = len(data)  # type: ignore[arg-type]
    if size == 0:
        raise UserError("the training set is empty: check the numbers of samples in params.yaml")
    batch_size = min(settings.batch_size, size)
    steps_per_epoch = -(-size // batch_size)
    log = track if fabric.global_rank == 0 else None
    if log is not None:
        write_json(directory / "run.json", {"run_id": log.id})

    def log_epoch(row: Mapping[str, float]) -> None:
        if log is not None:
            epochs = int(row["epoch"]) + 1
            values = {name: value for name, value in row.items() if name != "epoch"}
            log.log(values, step=epochs * steps_per_epoch if settings.log_every_steps else epochs)

    identity = _digest(fingerprint, seed, settings.model_dump(mode="json"), _describe(model))
    finished = _finished(directory, identity)
    if finished is not None:
        model.load_state_dict(load_tensors(directory / "best.safetensors")[0])
        for row in finished.history:
            log_epoch(row)
        return finished

    _seed_everything(seed, 0, 0)
    runner = fabric.setup_module(_Call(model))
    optimizer = fabric.setup_optimizers(_make_optimizer(runner, settings))
    if isinstance(data, TensorDataset):
        data = TensorDataset(*(tensor.to(fabric.device) for tensor in data.tensors))

    state = _State()
    _resume(fabric, runner, optimizer, directory / "last.safetensors", identity, state)
    for row in state.history:
        log_epoch(row)
    started = time.perf_counter() - state.seconds
    pending: list[tuple[int, dict[str, Tensor]]] = []
    log_every = 1 if fabric.device.type == "cpu" else 20

    def save() -> None:
        state.seconds = time.perf_counter() - started
        _save(fabric, runner, optimizer, directory / "last.safetensors", identity, state)

    def flush() -> None:
        _check_losses(pending, directory, state)

    while state.epoch < settings.epochs and not state.stopped:
        runner.train()
        for index, batch in _batches(data, size, batch_size, seed, state, fabric, num_workers):
            step = state.epoch * steps_per_epoch + index
            rate = settings.learning_rate_at(step / steps_per_epoch)
            for group in optimizer.param_groups:
                group["lr"] = rate
            _seed_everything(seed, step, fabric.global_rank)
            moment = Moment(state.epoch, step, settings.epochs, steps_per_epoch)
            losses = dict(runner(functools.partial(_at, loss, moment), batch))
            fabric.backward(losses["loss"])
            if settings.gradient_clip is not None:
                losses["gradient_norm"] = fabric.clip_gradients(
                    runner, optimizer, max_norm=settings.gradient_clip, error_if_nonfinite=False
                )
            optimizer.step()
            optimizer.zero_grad()
            pending.append((step, {name: value.detach() for name, value in losses.items()}))
            state.step_in_epoch = index + 1
            if log is not None and settings.log_every_steps and (step + 1) % settings.log_every_steps == 0:
                flush()
                log.log({"train/loss": state.last_loss, "train/learning_rate": rate}, step=step + 1)
            if len(pending) >= log_every:
                flush()
                if report:
                    report((step + 1) / (settings.epochs * steps_per_epoch), f"loss {state.last_loss:.4g}")
            every = settings.checkpoint_every_steps
            if every and (step + 1) % every == 0 and state.step_in_epoch < steps_per_epoch:
                flush()
                save()
        flush()
        _end_of_epoch(runner, validate, monitor, settings, directory, identity, fabric, state, steps_per_epoch)
        log_epoch(state.history[-1])
        last = state.stopped or state.epoch == settings.epochs
        if last or state.epoch % settings.checkpoint_every_epochs == 0:
            save()

    fabric.barrier()
    weights, note = load_tensors(directory / "best.safetensors")
    _load_full_weights(runner, weights, fabric)
    result = FitResult(state.epoch, note["epoch"], note["value"], state.seconds, state.history)
    if fabric.global_rank == 0:
        write_json(directory / "finished.json", {"identity": identity, **asdict(result)})
        (directory / "last.safetensors").unlink(missing_ok=True)
    return result


class _Call(nn.Module):
    """Run a function on the model inside one wrapped forward, so that DDP and FSDP see one call a step."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return function(self.model, *arguments)


def _at(loss: Loss, moment: Moment, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
    # Bound in advance, since Fabric converts the tensors of all arguments and cannot rebuild a frozen Moment.
    return loss(model, batch, moment)


@dataclass
class _State:
    """What a checkpoint carries besides weights and optimizer."""

    epoch: int = 0
    step_in_epoch: int = 0
    best_value: float | None = None
    best_epoch: int = -1
    stopped: bool = False
    seconds: float = 0.0
    last_loss: float = float("nan")
    sums: dict[str, float] = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list)


def _make_optimizer(model: nn.Module, settings: TrainingSettings) -> torch.optim.Optimizer:
    common: dict[str, Any] = {"lr": settings.learning_rate, "weight_decay": settings.weight_decay}
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if settings.optimizer == "sgd":
        return torch.optim.SGD(parameters, **common)
    kind = torch.optim.AdamW if settings.optimizer == "adamw" else torch.optim.Adam
    return kind(parameters, betas=settings.betas, **common)


def _seed_everything(seed: int, step: int, rank: int) -> None:
    """Make the randomness of a step a function of seed, step and process alone."""
    value = int.from_bytes(hashlib.blake2b(f"{seed}/{step}/{rank}".encode(), digest_size=8).digest(), "little")
    if torch.accelerator.is_available():
        torch.manual_seed(value)
    else:
        # torch.manual_seed would also leave word for a GPU that is not there, which takes longer than a small step.
        torch.default_generator.manual_seed(value)
    np.random.seed(value % 2**32)  # noqa: NPY002 (augmentations of other libraries draw from it)
    random.seed(value)


class _Seeded(Dataset):
    """A data set whose random augmentations are a function of seed, epoch and index, in any worker process."""

    def __init__(self, data: Dataset, seed: int, epoch: int) -> None:
        self.data, self.seed, self.epoch = data, seed, epoch

    def __getitem__(self, index: int) -> Any:
        _seed_everything(self.seed, self.epoch, -1 - index)
        return self.data[index]


def _batches(
    data: TensorDataset | Dataset,
    size: int,
    batch_size: int,
    seed: int,
    state: _State,
    fabric: Fabric,
    num_workers: int,
) -> Iterator[tuple[int, Batch]]:
    """Yield (index in the epoch, batch); each process gets its share of every batch, the order follows the seed."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + state.epoch)
    order = torch.randperm(size, generator=generator)
    shares = []
    for chunk in order.split(batch_size):
        missing = -len(chunk) % fabric.world_size
        # Processes must agree on the number of examples: the last batch borrows from its own beginning.
        chunk = torch.cat([chunk, chunk.repeat(-(-missing // len(chunk)))[:missing]]) if missing else chunk
        shares.append(chunk[fabric.global_rank :: fabric.world_size])
    todo = shares[state.step_in_epoch :]
    if isinstance(data, TensorDataset):
        loaded: Iterator[Any] = (tuple(tensor[share.to(tensor.device)] for tensor in data.tensors) for share in todo)
    else:
        loader = DataLoader(
            _Seeded(data, seed, state.epoch),
            batch_sampler=[share.tolist() for share in todo],
            num_workers=num_workers,
            pin_memory=fabric.device.type == "cuda",
        )
        loaded = (fabric.to_device(batch) for batch in loader)
    yield from enumerate(loaded, start=state.step_in_epoch)


def _check_losses(pending: list[tuple[int, dict[str, Tensor]]], directory: Path, state: _State) -> None:
    """Bring the losses of the last steps to the CPU, stop at the first that is not finite, add up the rest."""
    if not pending:
        return
    names = list(pending[0][1])
    values = torch.stack([torch.stack([losses[name].float() for name in names]) for _, losses in pending]).tolist()
    for (step, _), row in zip(pending, values, strict=True):
        named = dict(zip(names, row, strict=True))
        if not np.isfinite(named["loss"]):
            last = directory / "last.safetensors"
            kept = f"the last good checkpoint is {last}" if last.exists() else "no checkpoint was written before"
            raise Diverged(
                f"the loss became {named['loss']} in step {step} (epoch {state.epoch}); {kept}. "
                "Lower learning_rate or set gradient_clip in params.yaml"
            )
        state.last_loss = named["loss"]
        for name, value in named.items():
            state.sums[name] = state.sums.get(name, 0.0) + value
    pending.clear()


def _end_of_epoch(
    runner: nn.Module,
    validate: Validation | None,
    monitor: str,
    settings: TrainingSettings,
    directory: Path,
    identity: str,
    fabric: Fabric,
    state: _State,
    steps_per_epoch: int,
) -> None:
    """Validate, keep the best weights, write the epoch's row, decide whether to stop."""
    row = {f"train/{name}": total / steps_per_epoch for name, total in state.sums.items()}
    row["train/learning_rate"] = settings.learning_rate_at(state.epoch)
    last = state.epoch + 1 == settings.epochs
    due = (state.epoch + 1) % settings.validate_every_epochs == 0 or last
    value = None
    if validate is not None and due:
        runner.eval()
        with torch.no_grad():
            row |= {name: float(number) for name, number in runner(validate).items()}
        if monitor not in row:
            raise UserError(f"validate returned {sorted(row)}, but the loop watches {monitor!r}")
        value = row[monitor]
    better = value is not None and np.isfinite(value) and (state.best_value is None or value < state.best_value)
    if better or (validate is None and last):
        state.best_value, state.best_epoch = value, state.epoch
        weights = _full_weights(runner, fabric)
        if fabric.global_rank == 0:
            note = {"epoch": state.epoch, "value": value, "identity": identity}
            save_tensors(directory / "best.safetensors", weights, note)
    elif state.best_epoch < 0 and last:
        raise Diverged(f"{monitor} was never finite in {settings.epochs} epochs: lower learning_rate in params.yaml")
    patience = settings.early_stopping_epochs
    state.stopped = bool(patience and state.best_epoch >= 0 and state.epoch - state.best_epoch >= patience)
    state.history.append({"epoch": state.epoch, **row})
    state.epoch, state.step_in_epoch, state.sums = state.epoch + 1, 0, {}


def _is_sharded(fabric: Fabric) -> bool:
    return isinstance(fabric.strategy, FSDPStrategy | ModelParallelStrategy)


def _full_weights(runner: nn.Module, fabric: Fabric) -> dict[str, Tensor]:
    """The whole model's weights by name, gathered to the first process where they are sharded."""
    if _is_sharded(fabric):
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights = get_model_state_dict(runner._forward_module, options=options)
    else:
        weights = runner.module.state_dict()
    return {name.removeprefix("model."): tensor for name, tensor in weights.items()}


def _load_full_weights(runner: nn.Module, weights: dict[str, Tensor], fabric: Fabric) -> None:
    """Inverse of `_full_weights`."""
    weights = {f"model.{name}": tensor for name, tensor in weights.items()}
    if _is_sharded(fabric):
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

        set_model_state_dict(runner._forward_module, weights, options=StateDictOptions(full_state_dict=True))
    else:
        runner.module.load_state_dict(weights)


def _save(fabric: Fabric, runner: nn.Module, optimizer: Any, path: Path, identity: str, state: _State) -> None:
    """Write weights, optimizer and progress to one file, from the first process."""
    weights = _full_weights(runner, fabric)
    if _is_sharded(fabric):
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        optimizer_state = get_optimizer_state_dict(runner._forward_module, optimizer.optimizer, options=options)
    else:
        optimizer_state = optimizer.optimizer.state_dict()
    if fabric.global_rank == 0:
        tensors, rest = pack_optimizer(optimizer_state)
        everything = {f"model.{name}": tensor for name, tensor in weights.items()}
        everything |= {f"optimizer.{name}": tensor for name, tensor in tensors.items()}
        save_tensors(path, everything, {"identity": identity, "state": asdict(state), "optimizer": rest})
    fabric.barrier()


def _resume(fabric: Fabric, runner: nn.Module, optimizer: Any, path: Path, identity: str, state: _State) -> None:
    """Continue from a checkpoint if there is one of the same run; a damaged or foreign one is set aside."""
    if not path.exists():
        return
    tensors, note = load_tensors(path)
    if note.get("identity") != identity:
        fabric.barrier()
        if fabric.global_rank == 0:
            path.unlink()
        fabric.barrier()
        return
    weights = {name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")}
    _load_full_weights(runner, weights, fabric)
    packed = {name.removeprefix("optimizer."): t for name, t in tensors.items() if name.startswith("optimizer.")}
    if _is_sharded(fabric):
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict

        options = StateDictOptions(full_state_dict=True)
        restored = unpack_optimizer(packed, note["optimizer"], named=True)
        set_optimizer_state_dict(runner._forward_module, optimizer.optimizer, restored, options=options)
    else:
        optimizer.optimizer.load_state_dict(unpack_optimizer(packed, note["optimizer"], named=False))
    for name, value in note["state"].items():
        setattr(state, name, value)


def _finished(directory: Path, identity: str) -> FitResult | None:
    """The result of an earlier run with the same identity, if it finished."""
    try:
        record = json.loads((directory / "finished.json").read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    if record.pop("identity", None) != identity or not (directory / "best.safetensors").exists():
        (directory / "finished.json").unlink()
        return None
    return FitResult(**record)


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def _describe(model: nn.Module) -> list[tuple[str, list[int]]]:
    return [(name, list(tensor.shape)) for name, tensor in model.state_dict().items()]
