"""What house language models cost to train and to look into: `python benchmarks/language_models.py`, some ten minutes.

Training: the loop against a bare one and against its matrix products alone; three seeds as processes of one thread
against one batched computation (`torch.func`). Writes results/house_lm.csv and .png.

Looking inside: a hooked forward pass against the model's own; the most attended position of every head in one pass,
against one pass a head and against attention patterns kept whole, as contexts and heads grow. Writes
results/looking_inside.csv and .png. Times are medians over turns, on one CPU thread where nothing else is said.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

# Before torch is loaded: threads that compete would be all that is measured.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from common import machine, save_figure, take_turns, write_table
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, stack_module_state, vmap
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from pipelines.house_lm.config import Mixture, Params, load
from pipelines.house_lm.train import Corpus, _fit, make_corpus, make_optimizer, training_step
from shared.lm.hooked import HookedLM
from shared.lm.hooks import Hook, mask_heads
from shared.lm.model import HouseConfig, HouseModel
from shared.training.parallel import Job, Report, run_jobs

ROOT = Path(__file__).parents[1]
STEPS = 20
SEEDS = 3
LENGTHS = (256, 512, 1024, 2048, 4096)
HEADS = (8, 16, 32)
LENGTH, DECODED = 1024, 8
Case = Callable[[], Any]
Row = dict[str, Any]


def seconds(case: Case) -> float:
    started = time.perf_counter()
    case()
    return time.perf_counter() - started


def medians(cases: dict[str, Case], turns: int) -> dict[str, float]:
    """Median seconds of each case over the turns, after one that does not count."""
    for case in cases.values():
        case()
    timed = take_turns({name: partial(seconds, case) for name, case in cases.items()}, turns)
    return {name: statistics.median(values) for name, values in timed.items()}


# --- training ---------------------------------------------------------------------------------------------------------


def train_bare(config: HouseConfig, mixture: Mixture, batches: list[Tensor]) -> None:
    """`STEPS` updates with nothing around them."""
    model = HouseModel(config)
    optimizer = make_optimizer(model, mixture)
    for batch in batches:
        training_step(model, optimizer, batch, mixture.gradient_clip)


def train_house(config: HouseConfig, mixture: Mixture, params: Params, corpus: Corpus) -> None:
    """The same as models are trained: data generated on the way, losses kept, checkpoints."""
    with tempfile.TemporaryDirectory() as place:
        _fit(HouseModel(config), mixture, params, corpus, Path(place), "bench", None, None)


def multiply(pairs: list[tuple[Tensor, Tensor]], weights: list[Tensor]) -> None:
    """The matrix products of `STEPS` updates: each weight's, and two for its gradients; not those of attention."""
    for _ in range(STEPS):
        for (inputs, outputs), weight in zip(pairs, weights, strict=True):
            _ = inputs @ weight.T, outputs @ weight, outputs.T @ inputs


def train_processes(config: HouseConfig, mixture: Mixture, batches: list[Tensor], workers: int) -> None:
    """`SEEDS` models, each in a process of one thread."""
    jobs = [Job(f"seed {seed}", _train_bare, (config, mixture, batches)) for seed in range(SEEDS)]
    run_jobs(jobs, workers=workers)


def _train_bare(config: HouseConfig, mixture: Mixture, batches: list[Tensor], report: Report) -> None:
    train_bare(config, mixture, batches)


def train_batched(config: HouseConfig, mixture: Mixture, batches: list[Tensor], threads: int) -> None:
    """`SEEDS` models whose weights are stacked, each clipped by its own norm.

    Attention is that of plain operations: the fused one has no batching rule on CPU and would be called model by model.
    """
    torch.set_num_threads(threads)
    weights, buffers = stack_module_state([HouseModel(config) for _ in range(SEEDS)])
    optimizer = torch.optim.AdamW(weights.values(), lr=mixture.learning_rate, fused=True)
    skeleton = HouseModel(config).to("meta")

    def loss(weights: dict[str, Tensor], buffers: dict[str, Tensor], batch: Tensor) -> Tensor:
        logits = functional_call(skeleton, (weights, buffers), (batch[:, :-1],))
        return functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())

    step = vmap(grad_and_value(loss))
    for batch in batches:
        with sdpa_kernel(SDPBackend.MATH):
            gradients, _ = step(weights, buffers, batch.expand(SEEDS, *batch.shape))
        norm = sum(gradient.flatten(1).square().sum(dim=1) for gradient in gradients.values()).sqrt()
        scale = (mixture.gradient_clip / (norm + 1e-6)).clamp(max=1.0)
        for name, gradient in gradients.items():
            weights[name].grad = gradient * scale.view(-1, *[1] * (gradient.ndim - 1))
        optimizer.step()
    torch.set_num_threads(1)


def measure_training(size: str, turns: int) -> list[Row]:
    """A row a way to train the mixture `skills`: thousands of tokens a second, of all seeds together."""
    params = load(ROOT / "pipelines" / "house_lm", "full")[1]
    mixture = params.mixture("skills")
    mixture = mixture.model_copy(update={"steps": STEPS, "checkpoints": (), "parent": None, "until": None})
    corpus = make_corpus(mixture, "bench", 0)
    config = HouseConfig.of_size(size, len(corpus.vocabulary))
    batches = list(corpus.chunk(0).split(mixture.batch_size)[:STEPS])
    tokens = mixture.batch_size * mixture.length
    shapes = [m.weight.shape for m in HouseModel(config).modules() if isinstance(m, nn.Linear)]
    pairs = [(torch.randn(tokens, inputs), torch.randn(tokens, outputs)) for outputs, inputs in shapes]
    cases: dict[str, Case] = {
        "documents alone": lambda: corpus.chunk(1),
        "matrix products alone": partial(multiply, pairs, [torch.randn(shape) for shape in shapes]),
        "bare loop": partial(train_bare, config, mixture, batches),
        "house loop": partial(train_house, config, mixture, params, corpus),
        f"{SEEDS} seeds, a process after the other": partial(train_processes, config, mixture, batches, 1),
        f"{SEEDS} seeds, 2 processes": partial(train_processes, config, mixture, batches, 2),
        f"{SEEDS} seeds batched, 1 thread": partial(train_batched, config, mixture, batches, 1),
        f"{SEEDS} seeds batched, 2 threads": partial(train_batched, config, mixture, batches, 2),
    }
    rows = []
    for name, median in medians(cases, turns).items():
        made = corpus.chunk(1)[:, 1:].numel() if name.startswith("documents") else STEPS * tokens
        made *= SEEDS if name.startswith(str(SEEDS)) else 1
        rows.append({"size": size, "case": name, "kilotokens_per_second": round(made / median / 1e3, 2)})
    return rows


# --- looking inside ---------------------------------------------------------------------------------------------------


def house(**options: int) -> HookedLM:
    """A house model of size S, of random weights."""
    torch.manual_seed(0)
    config = HouseConfig.of_size("S", 640, **{"max_length": 2 * max(LENGTHS), **options})
    return HookedLM(HouseModel(config).requires_grad_(False))


@torch.no_grad()
def measure_hooks(turns: int) -> list[Row]:
    """A forward pass: the model's own, hooked without hooks, keeping and replacing activations."""
    lm, rows = house(), []
    layers = range(lm.num_layers)
    uniform, zero = (mask_heads([(layer, 0) for layer in layers], mode) for mode in ("uniform", "zero"))
    last = [Hook("attn.z", layer, torch.zeros_like, positions=[-1], heads=[0]) for layer in layers]
    for batch_size, length in ((1, 16), (8, 96), (1, 1024)):
        tokens = torch.randint(lm.vocab_size, (batch_size, length))
        cases: dict[str, Case] = {
            "the model's own": partial(lm.model, tokens),
            "hooked, no hook": partial(lm.forward, tokens),
            "keep resid_post": partial(lm.forward, tokens, cache=["resid_post"]),
            "keep attn.z, mlp.act": partial(lm.forward, tokens, cache=["attn.z", "mlp.act"]),
            "keep attn.pattern": partial(lm.forward, tokens, cache=["attn.pattern"]),
            "keep attn.result": partial(lm.forward, tokens, cache=["attn.result"]),
            "mask a head a layer, uniform": partial(lm.forward, tokens, uniform),
            "mask a head a layer, zero": partial(lm.forward, tokens, zero),
            "zero a head a layer, last position": partial(lm.forward, tokens, last),
        }
        rows += _rows("forward", lm, batch_size, length, medians(cases, turns))
    return rows


@torch.no_grad()
def measure_detection(turns: int) -> list[Row]:
    """The answer to one prompt, with where every head looked in each of its steps."""
    rows = []
    sizes = [(length, {}) for length in LENGTHS]
    sizes += [(LENGTH, {"num_heads": heads, "hidden_size": 16 * heads}) for heads in HEADS]
    for length, options in sizes:
        lm = house(**options)
        tokens = torch.randint(lm.vocab_size, (1, length))
        cases: dict[str, Case] = {
            "no attention kept": partial(lm.generate, tokens, DECODED),
            "all heads in one pass": partial(lm.generate, tokens, DECODED, attention="argmax"),
            "whole patterns kept": partial(_keep_patterns, lm, tokens),
        }
        if lm.num_layers * lm.num_heads <= 64:  # beyond, its cost is known, and takes minutes
            cases["one pass a head"] = partial(_pass_a_head, lm, tokens)
        rows += _rows("detection", lm, 1, length, medians(cases, turns))
    return rows


def _pass_a_head(lm: HookedLM, tokens: Tensor) -> None:
    for layer in range(lm.num_layers):
        for head in range(lm.num_heads):
            seen: list[Tensor] = []
            watch = Hook("attn.pattern", layer, lambda rows, seen=seen: seen.append(rows.argmax(dim=-1)), heads=[head])
            lm.generate(tokens, DECODED, hooks=[watch])


def _keep_patterns(lm: HookedLM, tokens: Tensor) -> None:
    """Answer, then read prompt and answer again with all attention patterns kept."""
    made = lm.generate(tokens, DECODED).tokens
    _, kept = lm.forward(torch.cat([tokens, made], dim=1), cache=["attn.pattern"])
    kept.stack("attn.pattern")[..., -DECODED:, :].argmax(dim=-1)


def _rows(what: str, lm: HookedLM, batch_size: int, length: int, timed: dict[str, float]) -> list[Row]:
    about = {"what": what, "heads": lm.num_layers * lm.num_heads, "batch": batch_size, "context": length}
    return [about | {"case": name, "milliseconds": round(1e3 * value, 3)} for name, value in timed.items()]


# --- figures ----------------------------------------------------------------------------------------------------------


def draw_training(rows: list[Row], where: str) -> None:
    """Thousands of tokens a second, case by case; the generation of documents in words, as it is off the scale."""
    from matplotlib import pyplot as plt

    documents, *shown = rows
    figure, axes = plt.subplots(figsize=(8, 3.4), layout="constrained")
    bars = axes.barh([row["case"] for row in shown], [row["kilotokens_per_second"] for row in shown])
    axes.bar_label(bars, fmt="%.0f", padding=3)
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel(
        f"thousand tokens a second, all seeds together (documents are made at {documents['kilotokens_per_second']:.0f})"
    )
    axes.set_title(f"Training `skills`, size {documents['size']}: {where}", fontsize=9)
    save_figure("house_lm", figure)
    plt.close(figure)


def draw_looking(rows: list[Row], where: str) -> None:
    """Hooks against the model's own forward pass; detection as contexts and heads grow."""
    from matplotlib import pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    shapes = sorted({(row["batch"], row["context"]) for row in rows if row["what"] == "forward"})
    for shift, shape in enumerate(shapes):
        shown = {
            r["case"]: r["milliseconds"] for r in rows if r["what"] == "forward" and (r["batch"], r["context"]) == shape
        }
        own = shown.pop("the model's own")
        heights = [place + 0.26 * (shift - 1) for place in range(len(shown))]
        left.barh(heights, [value / own for value in shown.values()], 0.24, label=f"{shape[0]} × {shape[1]} tokens")
        left.set_yticks(range(len(shown)), list(shown))
    left.axvline(1, color="k", linewidth=1)
    left.invert_yaxis()
    left.set_xlabel("time of a forward pass, against the model's own")
    left.legend(fontsize=8, frameon=False)
    few = min(row["heads"] for row in rows)
    for axes, along, chosen in (
        (middle, "context", [r for r in rows if r["what"] == "detection" and r["heads"] == few]),
        (right, "heads", [r for r in rows if r["what"] == "detection" and r["context"] == LENGTH]),
    ):
        for case in dict.fromkeys(row["case"] for row in chosen):
            line = {row[along]: row["milliseconds"] for row in chosen if row["case"] == case}
            axes.loglog(list(line), list(line.values()), "o-", markersize=4, label=case)
        ticks = sorted({row[along] for row in chosen})
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.minorticks_off()
        axes.set_ylabel(f"prompt and {DECODED} decoded tokens (ms)")
    middle.set_xlabel(f"tokens in context ({few} heads)")
    right.set_xlabel(f"heads in the model ({LENGTH} tokens)")
    middle.legend(fontsize=8, frameon=False)
    figure.suptitle(f"{where}, one thread", fontsize=9)
    save_figure("looking_inside", figure)
    plt.close(figure)


def main() -> None:
    """Measure, write tables and figures, and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--size", default="S", help="of the model that is trained: S, M, T or D")
    options = parser.parse_args()
    torch.set_num_threads(1)
    where = machine()
    training = measure_training(options.size, options.turns)
    write_table("house_lm", training)
    draw_training(training, where)
    for row in training:
        print(f"{row['case']:40} {row['kilotokens_per_second']:10.1f} thousand tokens a second")
    looking = measure_hooks(options.turns) + measure_detection(options.turns)
    write_table("looking_inside", looking)
    draw_looking(looking, where)
    for row in looking:
        what = f"{row['what']}, {row['heads']} heads, {row['batch']} × {row['context']}"
        print(f"{what:40} {row['case']:36} {row['milliseconds']:10.2f} ms")


if __name__ == "__main__":
    main()
