"""What looking inside costs: `python -m shared.lm.bench` prints times on this machine, each the least of several runs.

A hooked forward pass is compared with the model's own, and a decoding step with and without attention rows, as context
and heads grow.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from shared.lm.hooked import HookedLM
from shared.lm.hooks import Hook, mask_heads
from shared.lm.model import HouseConfig, HouseModel

Row = tuple[str, str, float]


def least_milliseconds(runs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Wall time of each run's fastest repetition, the device's work finished.

    The runs take turns, so that a busy moment of the machine meets all of them alike.
    """
    least = dict.fromkeys(runs, float("inf"))
    for repetition in range(repeats + 1):
        for name, run in runs.items():
            begin = time.perf_counter()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if repetition:  # the first one warms up
                least[name] = min(least[name], 1e3 * (time.perf_counter() - begin))
    return least


def house(size: str = "S", device: str = "cpu", **options: int) -> HookedLM:
    """A house model of random weights."""
    torch.manual_seed(0)
    model = HouseModel(HouseConfig.of_size(size, 640, **{"max_length": 65536, **options}))
    return HookedLM(model.requires_grad_(False).to(device))


@torch.no_grad()
def forward_overhead(lm: HookedLM, batch_size: int, length: int, repeats: int = 10) -> Iterator[Row]:
    """Milliseconds of a forward pass: the model's own, hooked without hooks, keeping and replacing activations."""
    tokens = torch.randint(lm.vocab_size, (batch_size, length), device=lm.device)
    layers = range(lm.num_layers)
    zero = mask_heads([(layer, 0) for layer in layers], "zero")
    last = [Hook("attn.z", layer, torch.zeros_like, positions=[-1], heads=[0]) for layer in layers]
    runs: dict[str, Callable[[], Any]] = {
        "the model's own": lambda: lm.model(tokens),
        "hooked, no hook": lambda: lm.forward(tokens),
        "keep resid_post": lambda: lm.forward(tokens, cache=["resid_post"]),
        "keep attn.z, mlp.act": lambda: lm.forward(tokens, cache=["attn.z", "mlp.act"]),
        "keep attn.pattern": lambda: lm.forward(tokens, cache=["attn.pattern"]),
        "keep attn.result": lambda: lm.forward(tokens, cache=["attn.result"]),
        "mask a head a layer, uniform": lambda: lm.forward(tokens, mask_heads([(layer, 0) for layer in layers])),
        "mask a head a layer, zero": lambda: lm.forward(tokens, zero),
        "zero a head a layer, last position": lambda: lm.forward(tokens, last),
    }
    for name, milliseconds in least_milliseconds(runs, repeats).items():
        yield f"forward {batch_size}×{length}", name, milliseconds


@torch.no_grad()
def decoding_cost(lm: HookedLM, length: int, steps: int = 8, repeats: int = 5) -> Iterator[Row]:
    """Milliseconds of the prefill of `length` tokens and of one decoding step behind it."""
    tokens = torch.randint(lm.vocab_size, (1, length), device=lm.device)
    what = f"{lm.num_layers}×{lm.num_heads} heads, context {length}"
    past = lm.prefill(tokens[:, :-1])
    runs: dict[str, Callable[[], Any]] = {"prefill": lambda: lm.prefill(tokens[:, :-1])}
    for attention in (None, "argmax", "rows"):
        runs[f"step, attention {attention}"] = lambda a=attention: lm.generate(tokens, steps, past=past, attention=a)
    for name, milliseconds in least_milliseconds(runs, repeats).items():
        yield what, name, milliseconds if name == "prefill" else milliseconds / steps


def main() -> None:
    torch.set_num_threads(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"PyTorch {torch.__version__}, {device}, milliseconds")
    rows: list[Row] = []
    for batch_size, length in ((1, 16), (8, 96), (1, 1024)):
        rows += forward_overhead(house(device=device), batch_size, length)
    for length in (256, 1024, 4096):
        rows += decoding_cost(house(device=device), length)
    for num_heads in (8, 16):
        rows += decoding_cost(house(device=device, num_heads=num_heads, hidden_size=16 * num_heads), 1024)
    for what, name, milliseconds in rows:
        print(f"{what:32s} {name:36s} {milliseconds:9.3f}")


if __name__ == "__main__":
    main()
