"""What a published language model is told, in words of our own after the official template's plan."""

from __future__ import annotations

from collections.abc import Sequence

TASK = (
    "Below is the most likely transcript that a speech recognizer gave. Write down what was really said; where the "
    "transcript is wrong, words of the other transcripts may help."
)
TASK_FIRST_ONLY = "Below is the most likely transcript that a speech recognizer gave. Write down what was really said."
BEST, OTHERS, ANSWER = "### Most likely:", "### Others:", "### Correct:"
EXPLANATION = (
    "A speech recognizer turns sound into words. It is not certain, and gives several transcripts of the same words, "
    "the most likely first. A language model can re-score them: it knows which words follow each other, what makes "
    "sense, and how words that sound alike are mistaken for each other."
)


def prompt(hypotheses: Sequence[str], *, first_only: bool = False) -> str:
    """The prompt of a list, which its transcript follows; with `first_only` without the block of other hypotheses."""
    best, others = hypotheses[0], hypotheses[1:]
    if first_only or not others:
        return f"{TASK_FIRST_ONLY}\n\n{BEST}\n{best}\n\n{ANSWER}\n"
    return f"{TASK}\n\n{BEST}\n{best}\n\n{OTHERS}\n{' '.join(f'{other}.' for other in others)}\n\n{ANSWER}\n"


def prompt_with_demonstrations(
    hypotheses: Sequence[str],
    demonstrations: Sequence[tuple[Sequence[str], str]],
    *,
    first_only: bool = False,
    explain_task: bool = False,
) -> str:
    """Solved examples (lists and transcripts), then the list to solve; `explain_task` puts what it is about before."""
    parts = [EXPLANATION] if explain_task else []
    parts += [f"{prompt(nbest, first_only=first_only)}{reference}" for nbest, reference in demonstrations]
    return "\n\n".join([*parts, prompt(hypotheses, first_only=first_only)])
