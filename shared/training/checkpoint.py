"""Checkpoints: one safetensors file that holds weights and optimizer state, written whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from shared.config import UserError
from shared.files import atomic_path


def save_tensors(path: Path, tensors: dict[str, torch.Tensor], note: dict[str, Any] | None = None) -> None:
    """Write named tensors and a JSON note atomically (temporary file, fsync, rename)."""
    # Tied weights share storage, which safetensors refuses: clone whatever was seen before.
    seen: set[int] = set()
    out = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        address = tensor.untyped_storage().data_ptr()
        out[name] = tensor.clone() if address in seen else tensor
        seen.add(address)
    with atomic_path(path) as temporary:
        try:
            save_file(out, temporary, metadata={"note": json.dumps(note or {})})
        except SafetensorError as error:  # a full disk, say
            raise OSError(f"{path} was not written: {error}") from error


def load_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read back what `save_tensors` wrote; a missing or damaged file is a `UserError`."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            note = json.loads((file.metadata() or {}).get("note", "{}"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing: train the model first") from None
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is damaged ({error}): delete it and run the training again") from None
    return tensors, note


def save_weights(path: Path, model: nn.Module, note: dict[str, Any] | None = None) -> None:
    """Write a model's weights and buffers."""
    save_tensors(path, model.state_dict(), note)


def load_weights(path: Path, model: nn.Module) -> dict[str, Any]:
    """Load weights into `model` in place and return the note saved with them; names and shapes must fit."""
    tensors, note = load_tensors(path)
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise UserError(f"{path} does not fit the model (trained with other params?): {error}") from None
    return note


def pack_optimizer(state: dict[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Split an optimizer's state_dict into flat tensors and the JSON-able rest."""
    tensors: dict[str, torch.Tensor] = {}
    scalars: dict[str, dict[str, Any]] = {}
    for key, entries in state["state"].items():
        for name, value in entries.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{key}|{name}"] = value
            else:
                scalars.setdefault(str(key), {})[name] = value
    return tensors, {"param_groups": state["param_groups"], "scalars": scalars}


def unpack_optimizer(tensors: dict[str, torch.Tensor], rest: dict[str, Any], *, named: bool) -> dict[str, Any]:
    """Invert `pack_optimizer`; state keys are parameter names if `named`, else indices."""
    state: dict[Any, dict[str, Any]] = {}
    convert = str if named else int
    for name, tensor in tensors.items():
        key, entry = name.rsplit("|", 1)
        state.setdefault(convert(key), {})[entry] = tensor
    for key, entries in rest["scalars"].items():
        state.setdefault(convert(key), {}).update(entries)
    return {"state": state, "param_groups": rest["param_groups"]}
