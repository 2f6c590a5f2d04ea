"""Tables and models for tests, small enough to check by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import yaml
from numpy.typing import NDArray

from shared.config import load_params
from shared.data.tabular import Table, make_table

from ..config import LanguageModel, Params
from ..model import build_model
from ..tokens import Tokenizer, train_tokenizer

FOLDER = Path(__file__).parents[1]
SECTIONS: dict[str, Any] = yaml.safe_load((FOLDER / "params.yaml").read_text(encoding="utf-8"))
PROFILES = [name for name in SECTIONS if name != "profile"]


def params_of(profile: str) -> Params:
    return load_params(FOLDER / "params.yaml", Params, profile)[1]


def people(rows: int = 60, **columns: Any) -> Table:
    """A table whose class follows the age, with a category and a column that says nothing."""
    rng = np.random.default_rng(0)
    age = rng.integers(18, 80, rows)
    data = {
        "age": age,
        "job_title": rng.choice(["clerk", "cook", "driver"], rows),
        "score": rng.normal(0, 10, rows).round(6),
        "income": np.where(age > 45, "high", "low"),
    }
    return make_table(
        pa.table(data | columns),
        "income",
        name="people",
        description="People at work.",
        column_descriptions={"age": "Age in years.", "job_title": "What they do."},
    )


def small_model(seed: int = 0, **settings: Any) -> Any:
    """GPT-2 of one layer, in evaluation mode."""
    sizes = {"num_layers": 2, "hidden_size": 16, "num_heads": 2, "context": 96, "vocab_size": 300, "dropout": 0.0}
    return build_model(LanguageModel(**(sizes | settings)), 300, seed=seed).eval()


def tokenizer_of(texts: list[str], vocab_size: int = 320) -> Tokenizer:
    bpe = train_tokenizer(texts, vocab_size)
    return Tokenizer(bpe, bpe.token_to_id("<end>"), bpe.token_to_id("<pad>"))


def random_tokens(rng: np.random.Generator, shortest: int, longest: int) -> list[int]:
    size = int(rng.integers(shortest, longest + 1))
    tokens: NDArray = rng.integers(2, 300, size)
    return tokens.tolist()
