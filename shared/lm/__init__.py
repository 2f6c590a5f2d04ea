"""Language models that papers look into: the house models and any Hugging Face causal language model.

lm = load_lm("house:skills:S:0")
output = lm.forward(lm.encode("<bos> n1 n2 n1"), cache=["attn.pattern"])
output.kept["attn.pattern", 2]                                    # [B, H, T, T] of layer 2
lm.forward(tokens, hooks=[Hook("attn.z", 1, torch.zeros_like, heads=[3])])  # without head 3 of layer 1
"""

from shared.lm.hooked import Generation, HookedLM, KeyValueCache, Output, mean_head_output
from shared.lm.hooks import POINTS, Activations, Hook, mask_heads
from shared.lm.load import WordTokenizer, house_folder, load_lm
from shared.lm.model import SIZES, HouseConfig, HouseModel

__all__ = [
    "POINTS",
    "SIZES",
    "Activations",
    "Generation",
    "Hook",
    "HookedLM",
    "HouseConfig",
    "HouseModel",
    "KeyValueCache",
    "Output",
    "WordTokenizer",
    "house_folder",
    "load_lm",
    "mask_heads",
    "mean_head_output",
]
