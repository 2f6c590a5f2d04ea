"""What a house model is trained on to answer in two steps: at once, and by way of a written word (`data.end_with`)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import Dataset

from shared.data.house_lexicon import Lexicon
from shared.lm.model import HouseModel
from shared.training import Moment

from .config import House, TwoSteps
from .data import ANSWER_LENGTH, QUESTIONS, Ending, end_with, random_needles

NO_LABEL = -100
# In turn; answers at once take the longest to learn.
ENDINGS: tuple[Ending, ...] = ("needle", "at_once", "in_steps", "at_once")


class Documents(Dataset):
    """Documents [T] with all endings in turn, and what is to be learned of them [T].

    Labels are the answers with their full stops; all else, and what fills documents up to one size, is NO_LABEL.

    The training loop seeds torch's randomness for each of them, from which all that is random here is drawn.
    """

    def __init__(self, house: House, task: TwoSteps, lexicon: Lexicon) -> None:
        self.house, self.task, self.lexicon = house, task, lexicon
        # The longest: `<bos>`, the context, the question for a code with its name, the code, a full stop.
        self.size = 1 + max(task.lengths) + len(QUESTIONS["plain"].split()) + 1 + ANSWER_LENGTH["needle"] + 1

    def __len__(self) -> int:
        return self.task.steps_per_epoch * self.task.batch_size

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        rng = np.random.default_rng(int(torch.randint(2**62, ())))
        length, ending = int(rng.choice(self.task.lengths)), ENDINGS[index % len(ENDINGS)]
        document = end_with(random_needles(self.house, length, 1, rng, self.lexicon), ending, self.lexicon)[0]
        labels = document.clone()
        labels[: -ANSWER_LENGTH[ending] - 1] = NO_LABEL
        filling = (0, self.size - len(document))
        return functional.pad(document, filling), functional.pad(labels, filling, value=NO_LABEL)


def answer_loss(model: HouseModel, batch: tuple[Tensor, Tensor], moment: Moment) -> dict[str, Tensor]:
    """Mean cross-entropy of the answers' tokens."""
    documents, labels = batch
    logits = model(documents[:, :-1])
    return {"loss": functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=NO_LABEL)}
