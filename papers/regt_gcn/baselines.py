"""What RegT-GCN is compared with: the paper's baselines, and the controls that it lacks.

Networks map x `[batch, P, N, num_features]` to `[batch, horizon, N]`, as those of `model.py`. Controls are fitted and
asked at once by `fit_predict`; they have no weights that a seed would change.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from shared.config import UserError
from shared.nn.graph import GATConv, GraphConv, chebyshev_operators, sage_operators

from .config import CONTROLS, STEP_MINUTES, Network
from .data import FEATURES, Float32Array, Prepared, Split
from .model import CHEBYSHEV_ORDER, Forecaster, OnGraph, SumOverSteps, TemporalAttention

SLOTS_PER_DAY = 24 * 60 // STEP_MINUTES
# Gradient boosting stops when its error in validation has not fallen for so many trees.
BOOSTING = {"learning_rate": 0.1, "max_depth": 6, "tree_method": "hist", "objective": "reg:squarederror"}
MAX_TREES, PATIENCE_TREES = 300, 10

# The three features that STID embeds; its embeddings of the time of day and the weekday are left out here as there.
STID_FEATURES = ("weekday", "hour", "occupancy")


class StatelessTGCNCell(nn.Module):
    """The T-GCN cell with a state of zero, which is what GraphSAGE and GAT run with: `[..., N, hidden_size]` of each x.

    H = (1 − z) ⊙ tanh(W_h conv_h(x) + c_h) with z = σ(W_z conv_z(x) + c_z). The reset gate and the halves of the W that
    multiply the state have no effect and are left out.
    """

    def __init__(self, update: nn.Module, new: nn.Module, hidden_size: int) -> None:
        super().__init__()
        self.update = nn.Sequential(update, nn.Linear(hidden_size, hidden_size))
        self.new = nn.Sequential(new, nn.Linear(hidden_size, hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(-self.update(x)) * torch.tanh(self.new(x))


class StackedGCN(nn.Module):
    """Two Chebyshev convolutions, ReLU and dropout between: `[..., N, num_features]` to `[..., N, hidden_size]`."""

    def __init__(self, num_features: int, middle_size: int, hidden_size: int, dropout: float, graph: Tensor) -> None:
        super().__init__()
        self.first = GraphConv(num_features, middle_size, len(graph))
        self.dropout = nn.Dropout(dropout)
        self.second = GraphConv(middle_size, hidden_size, len(graph))
        self.register_buffer("graph", graph, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.dropout(functional.relu(self.first(x, self.graph))), self.graph)


class StatelessGraphLSTM(nn.Module):
    """A graph-convolutional LSTM's hidden state after one step from zero: `[..., N, hidden_size]` of each x.

    i, c̃, o = σ(Cheb_i(x)), tanh(Cheb_c(x)), σ(Cheb_o(x) + w ⊙ c) with c = i ⊙ c̃, and h = o ⊙ tanh(c). The published
    code starts every step from a state of zero, so that the forget gate, the convolutions of the hidden state and the
    peepholes of the old cell have no effect; they are left out. Seo et al. (2018), equation 8.
    """

    def __init__(self, num_features: int, hidden_size: int, graph: Tensor) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(
            GraphConv(num_features, hidden_size, len(graph)) for _ in ("input", "cell", "output")
        )
        self.peephole = nn.Parameter(torch.empty(hidden_size))
        bound = (6 / (1 + hidden_size)) ** 0.5
        nn.init.uniform_(self.peephole, -bound, bound)
        self.register_buffer("graph", graph, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        to_input, to_cell, to_output = (convolution(x, self.graph) for convolution in self.convolutions)
        cell = torch.sigmoid(to_input) * torch.tanh(to_cell)
        return torch.sigmoid(to_output + self.peephole * cell) * torch.tanh(cell)


class StackedGRU(nn.Module):
    """Two GRU layers along the steps of each site alone, then Linear, ReLU, Linear on the last state.

    (The published code runs along another axis: it leaves `batch_first` at False, and the recurrence goes from site to
    site, in the order of the table.)
    """

    def __init__(self, num_features: int, hidden_size: int, horizon: int) -> None:
        super().__init__()
        self.gru = nn.GRU(num_features, hidden_size, num_layers=2, batch_first=True)
        self.decoder = nn.Sequential(nn.Linear(hidden_size, hidden_size), nn.ReLU(), nn.Linear(hidden_size, horizon))

    def forward(self, x: Tensor) -> Tensor:
        batch, _, num_nodes, _ = x.shape
        states, _ = self.gru(x.transpose(1, 2).flatten(0, 1))
        return self.decoder(states[:, -1]).unflatten(0, (batch, num_nodes)).transpose(1, 2)


class STID(nn.Module):
    """Spatial identity: each site's inputs and a learned vector of the site through residual layers, no graph.

    Shao et al. (2022), without the embeddings of time, as the paper runs it: Linear of (3 features · P steps) ‖ site
    embedding, then h + Linear(Dropout(ReLU(Linear(h)))) `num_layers` times, then Linear to the horizon.
    """

    def __init__(
        self, num_nodes: int, input_steps: int, horizon: int, embedding_size: int, num_layers: int, dropout: float
    ) -> None:
        super().__init__()
        self.features = [FEATURES.index(name) for name in STID_FEATURES]
        self.embed = nn.Linear(len(self.features) * input_steps, embedding_size)
        self.site = nn.Parameter(torch.empty(num_nodes, embedding_size))
        nn.init.xavier_uniform_(self.site)
        size = 2 * embedding_size
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(size, size), nn.ReLU(), nn.Dropout(dropout), nn.Linear(size, size))
            for _ in range(num_layers)
        )
        self.decoder = nn.Linear(size, horizon)

    def forward(self, x: Tensor) -> Tensor:
        history = x[..., self.features].transpose(1, 2).flatten(2)
        h = torch.cat([self.embed(history), self.site.expand(len(x), -1, -1)], dim=-1)
        for layer in self.layers:
            h = h + layer(h)
        return self.decoder(h).transpose(1, 2)


class STNorm(nn.Module):
    """Gated dilated convolutions along time that see their input raw, normalized over time and over sites.

    Deng et al. (2021): per layer, with u = [x ‖ temporal norm of x ‖ spatial norm of x], tanh(F u) ⊙ σ(G u) is added to
    x through one Linear and to the output through another; dilations 1, 2, 4 … within each block. The input is padded
    with zeros before its start up to the receptive field, so that the output is the last step's.

    Inside, time comes first, `[time, batch, N, channels]`: a step back in time is then a slice, and a convolution one
    matrix product a tap. Faster on a CPU than convolutions of `[batch, channels, N, time]`.
    """

    def __init__(
        self,
        num_nodes: int,
        num_features: int,
        horizon: int,
        channels: int = 16,
        num_blocks: int = 4,
        num_layers: int = 2,
        kernel_size: int = 2,
    ) -> None:
        super().__init__()
        self.kernel_size = kernel_size
        self.dilations = [2**layer for _ in range(num_blocks) for layer in range(num_layers)]
        self.receptive_field = 1 + (kernel_size - 1) * sum(self.dilations)
        self.start = nn.Linear(num_features, channels)
        self.temporal_norms = nn.ModuleList(TemporalNorm(num_nodes, channels) for _ in self.dilations)
        self.spatial_norms = nn.ModuleList(SpatialNorm(channels) for _ in self.dilations)
        # Filter and gate are one convolution.
        self.convolutions = nn.ModuleList(nn.Linear(kernel_size * 3 * channels, 2 * channels) for _ in self.dilations)
        self.residuals = nn.ModuleList(nn.Linear(channels, channels) for _ in self.dilations[1:])
        self.skips = nn.ModuleList(nn.Linear(channels, channels) for _ in self.dilations)
        self.decoder = nn.Sequential(nn.ReLU(), nn.Linear(channels, channels), nn.ReLU(), nn.Linear(channels, horizon))

    def forward(self, x: Tensor) -> Tensor:
        missing = max(self.receptive_field - x.shape[1], 0)
        x = self.start(functional.pad(x.transpose(0, 1), (0, 0, 0, 0, 0, 0, missing, 0)))
        output = 0
        for layer, dilation in enumerate(self.dilations):
            seen = torch.cat([x, self.temporal_norms[layer](x), self.spatial_norms[layer](x)], dim=-1)
            length = len(x) - (self.kernel_size - 1) * dilation
            taps = [seen[tap * dilation : tap * dilation + length] for tap in range(self.kernel_size)]
            filtered, gate = self.convolutions[layer](torch.cat(taps, dim=-1)).chunk(2, dim=-1)
            change = torch.tanh(filtered) * torch.sigmoid(gate)
            # Only the last step reaches the output.
            output = output + self.skips[layer](change[-1])
            if layer < len(self.residuals):
                x = x[-length:] + self.residuals[layer](change)
        return self.decoder(output).transpose(1, 2)


class TemporalNorm(nn.Module):
    """Batch normalization of every channel of every site, over time and batch: `[time, batch, N, channels]`."""

    def __init__(self, num_nodes: int, channels: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(num_nodes * channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.flatten(2).flatten(0, 1)).view_as(x)


class SpatialNorm(nn.Module):
    """Normalizes every channel over the sites of a moment: `[time, batch, N, channels]`."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(channels))
        self.shift = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        centered = x - x.mean(dim=-2, keepdim=True)
        # Eight times as fast on a CPU as torch.var along an axis that is not the last.
        variance = centered.square().sum(dim=-2, keepdim=True) / (x.shape[-2] - 1)
        return torch.addcmul(self.shift, centered, torch.rsqrt(variance + 1e-5) * self.scale)


def build_baseline(
    name: str, adjacency: Tensor, *, num_features: int, input_steps: int, horizon: int, settings: Network
) -> nn.Module:
    """Build a network of this module by name, on the state-wide graph; `model.build_model` has the names."""
    hidden_size = settings.hidden_size
    chebyshev = chebyshev_operators(adjacency, CHEBYSHEV_ORDER)
    if name == "graph_sage":
        operators = sage_operators(adjacency)
        convolutions = (OnGraph(GraphConv(num_features, hidden_size, len(operators)), operators) for _ in range(2))
        encoder = StatelessTGCNCell(*convolutions, hidden_size)
        return Forecaster(encoder, TemporalAttention(input_steps), horizon, settings)
    if name == "gat":
        if hidden_size % settings.gat_heads:
            raise UserError(f"hidden_size ({hidden_size}) must be a multiple of gat_heads ({settings.gat_heads})")
        head_size = hidden_size // settings.gat_heads
        convolutions = (OnGraph(GATConv(num_features, head_size, settings.gat_heads), adjacency) for _ in range(2))
        encoder = StatelessTGCNCell(*convolutions, hidden_size)
        return Forecaster(encoder, TemporalAttention(input_steps), horizon, settings)
    if name == "stacked_gcn":
        dropout = settings.stacked_gcn_dropout
        encoder = StackedGCN(num_features, settings.stacked_gcn_size, hidden_size, dropout, chebyshev)
        return Forecaster(encoder, SumOverSteps(), horizon, settings)
    if name == "gconv_lstm":
        encoder = StatelessGraphLSTM(num_features, hidden_size, chebyshev)
        return Forecaster(encoder, SumOverSteps(), horizon, settings)
    if name == "stacked_gru":
        return StackedGRU(num_features, hidden_size, horizon)
    if name == "stid":
        return STID(
            len(adjacency),
            input_steps,
            horizon,
            settings.stid_embedding_size,
            settings.stid_layers,
            settings.stid_dropout,
        )
    if name == "st_norm":
        return STNorm(
            len(adjacency),
            num_features,
            horizon,
            settings.st_norm_channels,
            settings.st_norm_blocks,
            settings.st_norm_layers,
            settings.st_norm_kernel_size,
        )
    raise UserError(f"unknown baseline {name!r}")


# --- Controls ---------------------------------------------------------------------------------------------------------


def fit_predict(
    name: str,
    prepared: Prepared,
    horizon: int,
    *,
    split: Split = "test",
    train_stride: int = 1,
    num_threads: int = 1,
    seed: int = 0,
) -> Float32Array:
    """Fit one of `CONTROLS` on the train part and forecast the windows of `split`: `[windows, horizon, N]`.

    In the units of `prepared.target`. Only readings that were observed are fitted to; those that were filled in still
    serve as the past. The last three arguments are for gradient boosting, which is fitted to every `train_stride`-th
    window, and which alone sees the validation part, to know when to stop.
    """
    if name not in CONTROLS:
        raise UserError(f"unknown control {name!r}; choose one of {', '.join(CONTROLS)}")
    if name == "xgboost":
        return _boosted(prepared, horizon, split, train_stride, num_threads, seed)
    first_targets = prepared.windows(split, horizon).first_targets
    targets = first_targets[:, None] + np.arange(horizon)
    if name == "persistence":
        last = prepared.target[first_targets - 1]
        return np.repeat(last[:, None], horizon, axis=1)
    train = prepared.splits.train
    slots = time_of_day(prepared.times)
    means = time_of_day_means(prepared.target[train], prepared.observed[train], slots[train])
    forecast = means[slots[targets]]
    if name == "time_of_day_ar1":
        residuals = prepared.target - means[slots]
        coefficients = lead_coefficients(residuals[train], prepared.observed[train], horizon)
        forecast = forecast + coefficients * residuals[first_targets - 1][:, None]
    return forecast.astype(np.float32)


def time_of_day(times: NDArray[np.datetime64]) -> NDArray[np.int64]:
    """The slot of ten minutes within its day that each time lies in, 0 … 143."""
    minutes = (times - times.astype("datetime64[D]")).astype("timedelta64[m]").astype(np.int64)
    return minutes // STEP_MINUTES


def time_of_day_means(
    values: Float32Array, observed: NDArray[np.bool_], slots: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Mean of what was observed, by slot and site: values `[T, N]` to `[144, N]`.

    A slot in which a site was never observed gets the mean of its other slots; a site never observed that of all sites.
    """
    total, count = np.zeros((SLOTS_PER_DAY, values.shape[1])), np.zeros((SLOTS_PER_DAY, values.shape[1]))
    np.add.at(total, slots, np.where(observed, values, 0))
    np.add.at(count, slots, observed)
    overall = total.sum() / max(count.sum(), 1)
    of_site = np.where(count.sum(0) > 0, total.sum(0) / np.maximum(count.sum(0), 1), overall)
    return np.where(count > 0, total / np.maximum(count, 1), of_site)


def lead_coefficients(residuals: NDArray[np.float64], observed: NDArray[np.bool_], horizon: int) -> NDArray[np.float64]:
    """The share of a site's residual that is left 1 … horizon steps later: residuals `[T, N]` to `[horizon, N]`.

    φ_lead = Σ_t e_(t+lead) e_t / Σ_t e_t², least squares for each site and lead of its own, over the t at which
    e_(t+lead) was observed. For an autoregression of first order φ_lead = φ^lead; on data that are none, this loses
    less at long leads than powers of φ.
    """
    coefficients = np.zeros((horizon, residuals.shape[1]))
    for lead in range(1, min(horizon, len(residuals) - 1) + 1):
        now, later = np.where(observed[lead:], residuals[:-lead], 0), residuals[lead:]
        power = (now**2).sum(axis=0)
        np.divide((now * later).sum(axis=0), power, out=coefficients[lead - 1], where=power > 0)
    return coefficients


def _boosted(
    prepared: Prepared, horizon: int, split: Split, train_stride: int, num_threads: int, seed: int
) -> Float32Array:
    """Gradient-boosted trees, one regressor for each lead time, all sites together."""
    import xgboost

    train = prepared.windows("train", horizon, train_stride, scaled=True)
    validation = prepared.windows("validation", horizon, scaled=True)
    # Quantiles are found once; the regressors differ in labels and weights only.
    train_matrix = xgboost.QuantileDMatrix(lag_features(train.inputs), nthread=num_threads)
    validation_matrix = xgboost.QuantileDMatrix(lag_features(validation.inputs), ref=train_matrix, nthread=num_threads)
    windows = prepared.windows(split, horizon)
    inputs = lag_features(windows.inputs)
    forecast = np.empty((len(windows), horizon, prepared.graph.num_nodes), np.float32)
    for lead in range(horizon):
        for matrix, part in ((train_matrix, train), (validation_matrix, validation)):
            matrix.set_info(label=part.targets[:, lead].ravel(), weight=part.observed[:, lead].ravel())
        booster = xgboost.train(
            BOOSTING | {"nthread": num_threads, "seed": seed},
            train_matrix,
            num_boost_round=MAX_TREES,
            evals=[(validation_matrix, "validation")],
            early_stopping_rounds=PATIENCE_TREES,
            verbose_eval=False,
        )
        trees = (0, booster.best_iteration + 1)
        forecast[:, lead] = booster.inplace_predict(inputs, iteration_range=trees).reshape(len(windows), -1)
    return prepared.unscale_target(forecast)


def lag_features(inputs: Float32Array) -> Float32Array:
    """What gradient boosting sees of each window and site, a row each: `[W, P, N, F]` to `[W·N, P + F]`.

    The P past values of the target, the other features at the last step, and the site's number.
    """
    num_windows, _, num_sites, _ = inputs.shape
    site = np.broadcast_to(np.arange(num_sites, dtype=np.float32)[:, None], (num_windows, num_sites, 1))
    columns = [inputs[..., -1].transpose(0, 2, 1), inputs[:, -1, :, :-1], site]
    return np.concatenate(columns, axis=2).reshape(num_windows * num_sites, -1)
