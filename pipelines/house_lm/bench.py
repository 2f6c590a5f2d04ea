"""How fast house models train: `python -m pipelines.house_lm.bench [size] [length]`.

The loop against a bare one and against its matrix products alone; three seeds as processes against one batched
computation (`torch.func`). Times are the least of several repetitions, on one thread a process.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, stack_module_state, vmap
from torch.nn import functional

from pipelines.house_lm.config import Mixture, Params, load
from pipelines.house_lm.train import Corpus, _fit, make_corpus, make_optimizer, training_step
from shared.lm.model import HouseConfig, HouseModel
from shared.training.parallel import Job, Report, run_jobs

STEPS = 10
REPETITIONS = 3
SEEDS = 3


def least(function: Callable[[], object], repetitions: int = REPETITIONS) -> float:
    """Seconds of the fastest call, after one that does not count."""
    function()
    times = []
    for _ in range(repetitions):
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return min(times)


def bare_loop(config: HouseConfig, mixture: Mixture, batches: list[Tensor]) -> float:
    """Seconds of `STEPS` updates with nothing around them."""
    model = HouseModel(config)
    optimizer = make_optimizer(model, mixture)

    def run() -> None:
        for batch in batches:
            training_step(model, optimizer, batch, mixture.gradient_clip)

    return least(run)


def house_loop(config: HouseConfig, mixture: Mixture, params: Params, corpus: Corpus) -> float:
    """The same as models are trained: data generated on the way, losses kept, checkpoints."""
    with tempfile.TemporaryDirectory() as place:
        return least(lambda: _fit(HouseModel(config), mixture, params, corpus, Path(place), "bench", None, None))


def matrix_products(config: HouseConfig, tokens: int) -> float:
    """Seconds of the matrix products of `STEPS` updates: each weight's, and two for its gradients; attention's not."""
    model = HouseModel(config)
    shapes = [tuple(module.weight.shape) for module in model.modules() if isinstance(module, nn.Linear)]
    pairs = [(torch.randn(tokens, inputs), torch.randn(tokens, outputs)) for outputs, inputs in shapes]
    weights = [torch.randn(shape) for shape in shapes]

    def run() -> None:
        for _ in range(STEPS):
            for (x, y), weight in zip(pairs, weights, strict=True):
                _ = x @ weight.T, y @ weight, y.T @ x

    return least(run)


def as_processes(config: HouseConfig, mixture: Mixture, batches: list[Tensor], workers: int) -> float:
    """Seconds in which `SEEDS` models have made `STEPS` updates each, in processes of one thread."""
    jobs = [Job(f"seed {seed}", _in_process, (config, mixture, batches)) for seed in range(SEEDS)]
    started = time.perf_counter()
    run_jobs(jobs, workers=workers)
    return time.perf_counter() - started


def _in_process(config: HouseConfig, mixture: Mixture, batches: list[Tensor], report: Report) -> None:
    model = HouseModel(config)
    optimizer = make_optimizer(model, mixture)
    for _ in range(REPETITIONS):
        for batch in batches:
            training_step(model, optimizer, batch, mixture.gradient_clip)


def batched(config: HouseConfig, mixture: Mixture, batches: list[Tensor], threads: int) -> float:
    """Seconds of `STEPS` updates of `SEEDS` models whose weights are stacked, each clipped by its own norm."""
    torch.set_num_threads(threads)
    models = [HouseModel(config) for _ in range(SEEDS)]
    weights, buffers = stack_module_state(models)
    optimizer = torch.optim.AdamW(weights.values(), lr=mixture.learning_rate, fused=True)
    skeleton = HouseModel(config).to("meta")

    def loss(weights: dict[str, Tensor], buffers: dict[str, Tensor], batch: Tensor) -> Tensor:
        logits = functional_call(skeleton, (weights, buffers), (batch[:, :-1],))
        return functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())

    step = vmap(grad_and_value(loss))

    def run() -> None:
        for batch in batches:
            gradients, _ = step(weights, buffers, batch.expand(SEEDS, *batch.shape))
            norm = sum(g.flatten(1).square().sum(dim=1) for g in gradients.values()).sqrt()
            scale = (mixture.gradient_clip / (norm + 1e-6)).clamp(max=1.0)
            for name, gradient in gradients.items():
                weights[name].grad = gradient * scale.view(-1, *[1] * (gradient.ndim - 1))
            optimizer.step()

    seconds = least(run)
    torch.set_num_threads(1)
    return seconds


def main(size: str = "S", length: str = "96") -> None:
    torch.set_num_threads(1)
    params = load(Path(__file__).parent, "full")[1]
    mixture = params.mixture("skills").model_copy(
        update={"steps": STEPS, "length": int(length), "checkpoints": (), "parent": None}
    )
    corpus = make_corpus(mixture, "bench", 0)
    config = HouseConfig.of_size(size, len(corpus.vocabulary))
    batches = list(corpus.chunk(0).split(mixture.batch_size)[:STEPS])
    tokens = mixture.batch_size * mixture.length
    started = time.perf_counter()
    made = sum(corpus.chunk(index)[:, 1:].numel() for index in range(4))
    print(f"documents:       {made / (time.perf_counter() - started) / 1e6:8.1f} M tokens/s generated")
    for name, seconds in {
        "matrix products": matrix_products(config, tokens),
        "bare loop": bare_loop(config, mixture, batches),
        "house loop": house_loop(config, mixture, params, corpus),
    }.items():
        print(
            f"{name + ':':16} {STEPS * tokens / seconds / 1e3:8.1f} K tokens/s, {1e3 * seconds / STEPS:.1f} ms a step"
        )
    together = SEEDS * STEPS * tokens / 1e3
    for workers in (1, 2):
        rate = together * REPETITIONS / as_processes(config, mixture, batches, workers)
        print(f"{SEEDS} seeds in {workers} process(es):        {rate:8.1f} K tokens/s in all")
    for threads in (1, 2):
        rate = together / batched(config, mixture, batches, threads)
        print(f"{SEEDS} seeds batched on {threads} thread(s):   {rate:8.1f} K tokens/s in all")


if __name__ == "__main__":
    main(*sys.argv[1:])
