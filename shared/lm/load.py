"""Find a language model by name: `house:<mixture>:<size>:<seed>`, a local folder, or a name on the Hugging Face hub."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from shared.config import UserError, repo_root
from shared.lm.decoder import FAMILIES
from shared.lm.hooked import HookedLM
from shared.lm.model import SIZES, HouseModel, read_json

HOUSE_MODELS = Path("pipelines/house_lm/models")


class WordTokenizer:
    """Words between spaces as tokens: the closed vocabulary of a house model, in the order of the ids."""

    def __init__(self, vocabulary: Sequence[str]) -> None:
        self.vocabulary = list(vocabulary)
        self.ids = {word: index for index, word in enumerate(self.vocabulary)}
        self.unk_token_id = self.ids.get("<unk>")

    def __len__(self) -> int:
        return len(self.vocabulary)

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Ids of the words; one outside the vocabulary becomes `<unk>`, or a `UserError` where there is none."""
        words = text.split()
        lacking = [word for word in dict.fromkeys(words) if word not in self.ids]
        if lacking and self.unk_token_id is None:
            raise UserError(
                f"the vocabulary of {len(self)} words does not hold {', '.join(map(repr, lacking[:10]))}: use its words"
            )
        first = [self.ids["<bos>"]] if add_special_tokens and "<bos>" in self.ids else []
        return first + [self.ids.get(word, self.unk_token_id) for word in words]

    def decode(self, tokens: Sequence[int]) -> str:
        return " ".join(self.vocabulary[token] for token in tokens)


def house_folder(mixture: str, size: str, seed: int) -> Path:
    """Where a house model lies: `<mixture>/<size>/seed<k>` under `$REPRISE_HOUSE_LM`, or else in this repository under
    `pipelines/house_lm/models`."""
    place = os.environ.get("REPRISE_HOUSE_LM")
    root = Path(place).expanduser() if place else repo_root() / HOUSE_MODELS
    return root / mixture / size / f"seed{seed}"


def load_lm(
    spec: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    local_files_only: bool = True,
) -> HookedLM:
    """The language model that `spec` names, with frozen weights, in evaluation mode.

    `house:skills:S:0` is a house model (see `house_folder`); else `spec` is the folder of a house or transformers
    model, or a name on the Hugging Face hub, looked for in the local cache unless `local_files_only` is False. `dtype`
    is by default the checkpoint's own. A transformers model is held against transformers' own forward pass on a few
    tokens before it is returned.
    """
    spec = str(spec)
    folder = _house_spec(spec) if spec.startswith("house:") else Path(spec).expanduser()
    is_house = spec.startswith("house:") or _is_house(folder)
    if is_house:
        tokens = read_json(folder / "vocab.json") if (folder / "vocab.json").is_file() else None
        model: nn.Module = HouseModel.load(folder)
        model = model if dtype is None else model.to(dtype)
        tokenizer: Any = None if tokens is None else WordTokenizer(tokens)
    else:
        model, tokenizer = _from_transformers(spec, dtype, local_files_only)
    lm = HookedLM(model.requires_grad_(False).to(device), tokenizer, spec)
    if not is_house:
        _check_against_transformers(lm)
    return lm


def _house_spec(spec: str) -> Path:
    _, *parts = spec.split(":")
    if len(parts) != 3 or parts[1] not in SIZES or not parts[2].isdigit():
        raise UserError(
            f"{spec!r} does not name a house model: write house:<mixture>:<size>:<seed> with a size of "
            f"{', '.join(SIZES)}, as in house:skills:S:0"
        )
    folder = house_folder(parts[0], parts[1], int(parts[2]))
    if not folder.is_dir():
        raise UserError(
            f"there is no trained model {spec} at {folder}: train it with the stages of pipelines/house_lm/dvc.yaml, "
            "or set REPRISE_HOUSE_LM to the folder that holds the house models"
        )
    return folder


def _is_house(folder: Path) -> bool:
    config = folder / "config.json"
    return config.is_file() and read_json(config).get("model_type") == "house"


def _from_transformers(spec: str, dtype: torch.dtype | None, local_files_only: bool) -> tuple[nn.Module, Any]:
    try:
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    except ImportError:
        raise UserError(
            "models other than house models need the transformers package: pip install transformers"
        ) from None
    options: dict[str, Any] = {"local_files_only": local_files_only}
    folder = Path(spec).expanduser()
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise UserError(f"{folder} holds no config.json: it is not the folder of a language model")
    source = str(folder) if folder.is_dir() else spec
    try:
        config = AutoConfig.from_pretrained(source, **options)
    except (OSError, ValueError) as error:
        hint = "pass local_files_only=False to look on the hub" if local_files_only else "check name and access"
        raise UserError(
            f"no language model {spec!r}: it is no folder here and can't be had from Hugging Face ({hint}). "
            f"{str(error).splitlines()[0]}"
        ) from None
    if config.model_type not in FAMILIES:
        raise UserError(
            f"{spec} is a model of type {config.model_type!r}, which has no adapter: supported are house, "
            f"{', '.join(FAMILIES)}"
        )
    try:
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype or "auto", **options)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"the weights of {spec} can't be loaded: {str(error).splitlines()[0]}") from None
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
    except (OSError, ValueError, KeyError, TypeError):
        return model, None  # `encode` says so when someone wants text
    # For a folder without the tokenizer's files, transformers makes one that knows nothing but special tokens.
    return model, tokenizer if set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens) else None


@torch.no_grad()
def _check_against_transformers(lm: HookedLM) -> None:
    """Refuse a checkpoint that has something in it that its family's adapter does not know."""
    tokens = torch.arange(min(16, lm.max_length), device=lm.device)[None] % lm.vocab_size
    expected = lm.model(tokens).logits.float()
    logits = lm.forward(tokens).logits
    tolerance = 1e-4 if lm.decoder.head.weight.dtype == torch.float32 else 0.05
    difference = float("inf") if logits is None else float((logits.float() - expected).abs().max())
    if not difference <= tolerance * max(1.0, float(expected.abs().max())):
        raise UserError(
            f"{lm.name}: the adapter's logits differ from transformers' own by up to {difference:.2g}. The checkpoint "
            "has something that its family's adapter does not know; it can't be looked into"
        )
