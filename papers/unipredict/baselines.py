"""What is trained on each table by itself: trees, linear model, networks, and the majority class.

All tuned ones get the same random search over a few settings, on rows held out of the training part; the library's
defaults are the first trial. Classes that a training part lacks get probability 0, and nothing crashes.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from shared.config import UserError
from shared.data.tabular import Table, baseline_encoder, category_sizes, feature_frame
from shared.evaluation.tabular import fit_predict_proba
from shared.training import Moment, TrainingSettings, fit

from .augment import make_trees, tree_inputs
from .config import BaselineSettings

if TYPE_CHECKING:
    from sklearn.compose import ColumnTransformer

Array = NDArray[np.float64]
Ints = NDArray[np.int64]
Options = Mapping[str, Any]

# Of a column of categories, as inputs of their own; the rest are one more.
MAX_CATEGORIES = 30
INSTALL = "install it with: pip install -e '.[unipredict]', or take {} out of models in params.yaml"

# What the random search draws from; trial 0 draws nothing, and is the defaults.
SEARCH: dict[str, dict[str, tuple[Any, ...]]] = {
    "logistic_regression": {"C": (0.01, 0.1, 1.0, 10.0, 100.0)},
    "xgboost": {
        "max_depth": (2, 3, 4, 6),
        "learning_rate": (0.03, 0.1, 0.3),
        "min_child_weight": (1, 3, 10),
        "reg_lambda": (1.0, 3.0, 10.0),
    },
    "mlp": {"alpha": (1e-4, 1e-2, 1.0), "learning_rate_init": (1e-3, 3e-3), "hidden_layer_sizes": ((100,), (50, 50))},
    "tabnet": {"n_d": (4, 8, 16), "n_steps": (2, 3), "gamma": (1.0, 1.3), "lambda_sparse": (1e-4, 1e-3)},
    "ft_transformer": {"num_blocks": (1, 2, 3), "learning_rate": (3e-4, 1e-3), "dropout": (0.0, 0.1, 0.2)},
}
# TabNet's batches hold this many rows, and its ghost batches a quarter; its defaults are 1,024 and 128.
TABNET_BATCH = 128
FT_BATCH = 64


def fit_and_predict(
    model: str,
    table: Table,
    labels: Ints,
    num_classes: int,
    rows: Ints,
    test_rows: Ints,
    settings: BaselineSettings,
    *,
    seed: int,
    search_seed: int = 0,
    tune: bool = True,
) -> Array:
    """Probabilities [test rows, K] of a baseline fitted on `rows`, tuned on a part of them if there are enough."""
    options: Options = {}
    if tune and model in SEARCH and settings.trials > 1 and len(rows) >= settings.min_rows_to_tune:
        options = search(model, table, labels, num_classes, rows, settings, search_seed)
    return _predict(model, table, labels, num_classes, rows, test_rows, settings, options, seed)


def search(
    model: str, table: Table, labels: Ints, num_classes: int, rows: Ints, settings: BaselineSettings, seed: int
) -> Options:
    """The options of the trial with the lowest validation log-loss, the earliest where several have it."""
    trials = list(draw_trials(model, settings.trials, seed))
    order = np.random.default_rng(seed).permutation(rows)
    size = max(1, round(settings.validation_fraction * len(rows)))
    held, rest = np.sort(order[:size]), np.sort(order[size:])
    losses = [
        log_loss(
            labels[held],
            _predict(model, table, labels, num_classes, rest, held, settings, options, seed),
        )
        for options in trials
    ]
    return trials[int(np.argmin(losses))]


def draw_trials(model: str, count: int, seed: int) -> list[dict[str, Any]]:
    """The defaults and `count` - 1 random settings, the same for a seed on every table."""
    rng = np.random.default_rng(seed)
    space = SEARCH[model]
    return [{}] + [
        {name: values[int(rng.integers(len(values)))] for name, values in space.items()} for _ in range(count - 1)
    ]


def log_loss(labels: Ints, probabilities: Array) -> float:
    """Mean negative log-probability of the labels, no lower than of a probability of 0.001."""
    return float(-np.log(np.maximum(probabilities[np.arange(len(labels)), labels], 1e-3)).mean())


def _predict(
    model: str,
    table: Table,
    labels: Ints,
    num_classes: int,
    rows: Ints,
    test_rows: Ints,
    settings: BaselineSettings,
    options: Options,
    seed: int,
) -> Array:
    truth = labels[rows]
    if model == "majority" or len(np.unique(truth)) == 1:
        return np.tile(np.eye(num_classes)[np.bincount(truth).argmax()], (len(test_rows), 1))
    if model == "xgboost":
        inputs, test_inputs = tree_inputs(table, rows, test_rows)
        return fit_predict_proba(make_trees(**options), inputs, truth, test_inputs, num_classes)
    categories = "ordinal" if model == "ft_transformer" else "one_hot"
    encoder = baseline_encoder(table, categories=categories, max_categories=MAX_CATEGORIES)
    inputs = encoder.fit_transform(feature_frame(table, rows))
    test_inputs = encoder.transform(feature_frame(table, test_rows))
    with warnings.catch_warnings():
        # Iterations are a budget here, and TabNet runs all of its epochs on purpose.
        warnings.filterwarnings("ignore", category=UserWarning)
        estimator = _estimator(model, encoder, settings, options, seed)
        return fit_predict_proba(estimator, inputs, truth, test_inputs, num_classes)


def _estimator(model: str, encoder: ColumnTransformer, settings: BaselineSettings, options: Options, seed: int) -> Any:
    """An unfitted classifier with scikit-learn's interface; `UserError` for a package that is not installed."""
    if model == "ft_transformer":
        return _FTTransformer(encoder, settings.ft_transformer_epochs, options, seed)
    if model == "logistic_regression":
        from sklearn.linear_model import LogisticRegression

        return LogisticRegression(**{"max_iter": 1000, **options})
    if model == "mlp":
        from sklearn.neural_network import MLPClassifier

        return MLPClassifier(**{"max_iter": settings.mlp_iterations, "random_state": seed, **options})
    return _TabNet(settings.tabnet_epochs, options, seed, fitting_batches=model == "tabnet")


class _TabNet:
    """pytorch-tabnet with scikit-learn's interface.

    With the package's defaults, batches of 1,024 rows of which an incomplete one is dropped, a table of up to 1,023
    rows is trained for no step at all, in silence. With `fitting_batches` they fit the table.
    """

    def __init__(self, epochs: int, options: Options, seed: int, *, fitting_batches: bool) -> None:
        try:
            from pytorch_tabnet.tab_model import TabNetClassifier
        except ImportError:
            raise UserError(f"TabNet needs pytorch-tabnet: {INSTALL.format('tabnet and tabnet_defaults')}") from None
        options = dict(options)
        if "n_d" in options:
            options["n_a"] = options["n_d"]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=UserWarning)
            self.classifier = TabNetClassifier(seed=seed, verbose=0, device_name="cpu", **options)
        self.epochs, self.fitting_batches = epochs, fitting_batches

    def fit(self, inputs: Array, labels: Ints) -> _TabNet:
        batches: dict[str, Any] = {}
        if self.fitting_batches:
            size = batch_size_without_remainder_of_one(len(inputs), TABNET_BATCH)
            batches = {"batch_size": size, "virtual_batch_size": max(2, size // 4), "drop_last": False}
            if size < TABNET_BATCH:
                batches["virtual_batch_size"] = size
        self.classifier.fit(inputs, labels, max_epochs=self.epochs, **batches)
        return self

    def predict_proba(self, inputs: Array) -> Array:
        return self.classifier.predict_proba(inputs)


def batch_size_without_remainder_of_one(num_rows: int, wanted: int) -> int:
    """The largest size up to `wanted` that leaves no last batch of one row, which batch normalization cannot train on.

    Ghost batches of a quarter of it may not leave one either: the size is a multiple of four where there are several.
    """
    if num_rows <= wanted:
        return max(num_rows, 2)
    sizes = range(wanted - wanted % 4, 4, -4)
    return next((size for size in sizes if num_rows % size != 1 and (num_rows % size) % (size // 4) != 1), 2)


# --- FT-Transformer ---------------------------------------------------------------------------------------------------


class _FTTransformer:
    """FT-Transformer of its authors' package, on numbers and embedded categories, with scikit-learn's interface."""

    def __init__(self, encoder: ColumnTransformer, epochs: int, options: Options, seed: int) -> None:
        try:
            import rtdl_revisiting_models  # noqa: F401
        except ImportError:
            raise UserError(
                f"FT-Transformer needs rtdl_revisiting_models: {INSTALL.format('ft_transformer')}"
            ) from None
        self.block = encoder.output_indices_["categories"]
        self.sizes = category_sizes(encoder) if self.block.stop > self.block.start else []
        self.epochs, self.options, self.seed = epochs, options, seed

    def fit(self, inputs: Array, labels: Ints) -> _FTTransformer:
        from rtdl_revisiting_models import FTTransformer

        numbers, categories = self._tensors(inputs)
        dropout = self.options.get("dropout", 0.1)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            self.network = FTTransformer(
                n_cont_features=numbers.shape[1],
                cat_cardinalities=self.sizes,
                d_out=int(labels.max()) + 1,
                n_blocks=self.options.get("num_blocks", 2),
                d_block=64,
                attention_n_heads=4,
                attention_dropout=dropout,
                ffn_d_hidden=None,
                ffn_d_hidden_multiplier=4 / 3,
                ffn_dropout=dropout,
                residual_dropout=0.0,
            )
        training = TrainingSettings(
            epochs=self.epochs,
            batch_size=FT_BATCH,
            learning_rate=self.options.get("learning_rate", 1e-3),
            weight_decay=1e-5,
            optimizer="adamw",
        )
        data = TensorDataset(numbers, categories, torch.from_numpy(labels))
        with tempfile.TemporaryDirectory() as folder:
            fit(self.network, data, _cross_entropy, training, directory=Path(folder), seed=self.seed)
        self.network.cpu().eval()
        return self

    @torch.no_grad()
    def predict_proba(self, inputs: Array) -> Array:
        return _logits(self.network, *self._tensors(inputs)).softmax(-1).double().numpy()

    def _tensors(self, inputs: Array) -> tuple[Tensor, Tensor]:
        """Numbers [rows, n] and codes of categories [rows, m]."""
        block, values = self.block, torch.from_numpy(inputs)
        numbers = torch.cat([values[:, : block.start], values[:, block.stop :]], dim=1)
        return numbers.float(), values[:, block].long()


def _logits(network: nn.Module, numbers: Tensor, categories: Tensor) -> Tensor:
    return network(numbers if numbers.shape[1] else None, categories if categories.shape[1] else None)


def _cross_entropy(network: nn.Module, batch: tuple[Tensor, ...], moment: Moment) -> dict[str, Tensor]:
    numbers, categories, labels = batch
    return {"loss": functional.cross_entropy(_logits(network, numbers, categories), labels)}
