"""Tiny random models of every family, for the tests."""

from __future__ import annotations

import torch
from torch import nn

from shared.lm import HookedLM, HouseConfig, HouseModel

VOCABULARY = 50
TRANSFORMERS = ("gpt2", "gpt_neox", "gpt_neox_serial", "opt", "llama", "mistral", "qwen2", "mixtral", "olmoe")
HOUSE = ("house", "house_gpt2_like")
EVERY = TRANSFORMERS + HOUSE


def make(name: str) -> nn.Module:
    """A model of 3 layers and 4 heads, with weights large enough that each part matters."""
    torch.manual_seed(0)
    if name in HOUSE:
        options = {} if name == "house" else {"act": "gelu", "norm": "layernorm", "pos": "learned"}
        shape = {"vocab_size": VOCABULARY, "num_layers": 3, "num_heads": 4, "hidden_size": 32, "max_length": 64}
        model: nn.Module = HouseModel(HouseConfig(**shape, **options))
    else:
        model = _transformers(name)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model.eval().requires_grad_(False)


def hooked(name: str) -> HookedLM:
    return HookedLM(make(name), name=name)


def prompts(batch_size: int = 2, length: int = 10) -> torch.Tensor:
    return torch.randint(VOCABULARY, (batch_size, length), generator=torch.Generator().manual_seed(1))


def _transformers(name: str) -> nn.Module:
    import transformers as hf

    shape = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "max_position_embeddings": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    grouped = {**shape, "num_key_value_heads": 2}
    opt = {key: value for key, value in shape.items() if key != "intermediate_size"}
    configs = {
        "gpt2": lambda: hf.GPT2Config(
            vocab_size=VOCABULARY, n_embd=32, n_layer=3, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2
        ),
        "gpt_neox": lambda: hf.GPTNeoXConfig(**shape),
        "gpt_neox_serial": lambda: hf.GPTNeoXConfig(**shape, use_parallel_residual=False, attention_bias=False),
        "opt": lambda: hf.OPTConfig(**opt, ffn_dim=48, word_embed_proj_dim=32),
        "llama": lambda: hf.LlamaConfig(**grouped),
        "mistral": lambda: hf.MistralConfig(**grouped, sliding_window=4),  # shorter than the tests' prompts
        "qwen2": lambda: hf.Qwen2Config(**grouped),
        "mixtral": lambda: hf.MixtralConfig(**grouped, num_local_experts=4),
        "olmoe": lambda: hf.OlmoeConfig(**grouped, num_experts=4, num_experts_per_tok=2),
    }
    return hf.AutoModelForCausalLM.from_config(configs[name]())
