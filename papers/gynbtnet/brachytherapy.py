"""Stage 3: trains the residual U-Net on the brachytherapy structures, in all its variants.

scratch            3            scratch_long       3, for as many steps as the three stages together
self_supervised    1 → 3        multi_organ    2 → 3        gynbtnet    1 → 2 → 3
"""

from __future__ import annotations

from shared.config import Stage

from .config import VARIANTS, Params
from .train import train_third_stage


def brachytherapy(stage: Stage[Params]) -> None:
    """Train all variants, numbers of cases and seeds; weights to runs/brachytherapy/<variant>/cases<n>/seed<n>."""
    train_third_stage(stage, VARIANTS)
