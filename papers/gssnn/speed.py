"""What training and search cost: networks one at a time and many at once; programs one by one and in blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.nn import functional

from kernels.bench import rounds

from .config import Params, SpeedSettings
from .learn import PlateauAdam
from .model import Ensemble, build_model, graph_tensors
from .symbolic.bench import search_speed
from .symbolic.interpreter import Graph


def step_times(
    settings: SpeedSettings, params: Params, graphs: Mapping[str, Graph], device: torch.device
) -> Iterator[dict[str, Any]]:
    """Rows of costs: milliseconds a network of a training step, and how much less than one at a time.

    The networks are those of population `ssn`, every one with a graph of its own, and of the baseline. The seed of a
    row is the number of the round.
    """
    chosen = [graphs[name] for name in sorted(graphs)]
    for kind in ("baseline", "ssn"):
        cases = {}
        for count in (1, *settings.networks):
            taken = [chosen[i % len(chosen)] for i in range(count)] if kind == "ssn" else None
            cases[str(count)] = _step(params, taken, count, device)
        for number, seconds in enumerate(rounds(cases, settings.rounds)):
            for name, duration in seconds.items():
                row = {"model": kind, "dataset": "speed", "seed": number, "networks": int(name)}
                yield row | {"metric": "milliseconds", "value": 1000 * duration / int(name)}
                yield row | {"metric": "speedup", "value": int(name) * seconds["1"] / duration}


def search_rates(settings: SpeedSettings) -> Iterator[dict[str, Any]]:
    """Rows of costs: programs enumerated and run per second, with each library, and the ratio to a plain version."""
    for measured in search_speed(settings.programs, settings.programs_compared, settings.rounds):
        row = {"model": f"search_{measured['library']}", "dataset": "speed", "programs": measured["programs"]}
        for metric in ("size", "programs_per_second", "plain_per_second", "ratio"):
            if metric in measured:
                yield row | {"seed": 0, "metric": metric, "value": measured[metric]}


def _step(params: Params, graphs: list[Graph] | None, count: int, device: torch.device) -> Callable[[], object]:
    """A call that takes one training step of `count` networks."""
    module = params.graph_module if graphs is not None else None
    models = [build_model(params.network, module, seed) for seed in range(count)]
    tensors = [graph_tensors(graph, params.graph_module) for graph in graphs] if graphs is not None else None
    ensemble = Ensemble(models, tensors, device)
    optimizer = PlateauAdam(ensemble, params.training)
    generators = [torch.Generator(device).manual_seed(seed) for seed in range(count)]
    size, batch = params.network.image_size, params.training.batch_size
    images = torch.rand(count, batch, 1, size, size, generator=torch.Generator().manual_seed(0)).to(device)
    labels = torch.arange(batch, device=device).remainder(2).float().expand(count, batch)

    def run() -> None:
        dropout = ensemble.draw_dropout(params.graph_module, batch, generators)
        logits = ensemble(images, dropout)
        loss = functional.binary_cross_entropy_with_logits(logits, labels, reduction="none").mean(dim=1)
        gradients = torch.autograd.grad(loss.sum(), list(ensemble.weights.values()))
        optimizer.step(torch.cat([gradient.flatten(1) for gradient in gradients], dim=1), loss.detach())

    return run
