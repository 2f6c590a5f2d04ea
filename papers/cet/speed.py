"""How long a step of coupled estimation takes: all members and pairs as one batch, and one pair after the other."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch

from .config import SpeedSettings, Variant
from .features import FeatureInputs
from .model import KernelNetwork, Models, Pairs, accumulate_gradients

CANDIDATES = 8
HIDDEN_SIZE = 32
COUPLED = Variant(weights="coupled")


def measure(settings: SpeedSettings) -> list[dict[str, Any]]:
    """Rows of costs.csv: seconds of weighing and both gradients, `batched` and in a `loop`, and their ratio.

    Both do the same arithmetic (see the tests); each is the fastest of some rounds, measured in turns.
    """
    runs = {"batched": batched(settings), "loop": looped(settings)}
    seconds = dict.fromkeys(runs, float("inf"))
    for _ in range(settings.rounds):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            seconds[name] = min(seconds[name], time.perf_counter() - started)
    rows = [(name, "seconds_per_step", value) for name, value in seconds.items()]
    rows.append(("loop_over_batched", "ratio", seconds["loop"] / seconds["batched"]))
    return [
        {"model": model, "dataset": "speed", "metric": metric, "seed": 0, "value": value}
        for model, metric, value in rows
    ]


def setup(settings: SpeedSettings) -> tuple[Models, Pairs, FeatureInputs]:
    """Two networks of all members, and random pairs of random features."""
    generator = torch.Generator().manual_seed(0)
    seeds = range(settings.members)
    relevance, selection = (
        KernelNetwork(settings.features, HIDDEN_SIZE, 0.0, [seed + shift for seed in seeds]) for shift in (0, 1000)
    )
    features = torch.randn(settings.pairs, CANDIDATES, settings.features, generator=generator)
    shape = (settings.members, settings.pairs)
    slots = torch.randint(CANDIDATES, (2, *shape), generator=generator)
    queries = torch.arange(settings.pairs).expand(shape)
    return Models(relevance, selection, relevance), Pairs(queries, *slots), FeatureInputs(features)


def batched(settings: SpeedSettings) -> Callable[[], dict[str, torch.Tensor]]:
    """A step as training takes it, but for the update and clipping; returns the losses, [members] each."""
    models, pairs, inputs = setup(settings)

    def run() -> dict[str, torch.Tensor]:
        _zero(models)
        return accumulate_gradients(models, pairs, inputs, COUPLED, math.inf)

    return run


def looped(settings: SpeedSettings) -> Callable[[], list[list[torch.Tensor]]]:
    """The same, pair by pair of member by member; losses of R, one a pair."""
    models, pairs, inputs = setup(settings)
    single = [
        Models(*(_member(network, number, settings) for network in (models.relevance, models.selection)))
        for number in range(settings.members)
    ]
    single = [Models(each.relevance, each.selection, each.relevance) for each in single]

    def run() -> list[list[torch.Tensor]]:
        losses = []
        for member, one in enumerate(single):
            _zero(one)
            losses.append([])
            for pair in range(settings.pairs):
                at = (slice(member, member + 1), slice(pair, pair + 1))
                batch = Pairs(pairs.queries[at], pairs.positives[at], pairs.negatives[at])
                losses[-1].append(accumulate_gradients(one, batch, inputs, COUPLED, math.inf)["relevance"])
        return losses

    return run


def _zero(models: Models) -> None:
    for network in models.trained():
        network.zero_grad()


def _member(network: torch.nn.Module, number: int, settings: SpeedSettings) -> KernelNetwork:
    """One member of a network as a network of its own."""
    alone = KernelNetwork(settings.features, HIDDEN_SIZE, 0.0, [0])
    alone.load_state_dict({name: tensor[number : number + 1] for name, tensor in network.state_dict().items()})
    return alone
