"""One training loop for every paper: settings, loop, checkpoints, and runs side by side."""

from shared.training.checkpoint import load_weights, save_weights
from shared.training.loop import Diverged, FitResult, Moment, fit, make_fabric
from shared.training.parallel import Job, run_jobs
from shared.training.settings import TrainingSettings

__all__ = [
    "Diverged",
    "FitResult",
    "Job",
    "Moment",
    "TrainingSettings",
    "fit",
    "load_weights",
    "make_fabric",
    "run_jobs",
    "save_weights",
]
