"""ROVER: words of several hypotheses, aligned one after another and then voted on (Fiscus 1997).

Fiscus, "A post-processing system to yield reduced word error rates: Recognizer Output Voting Error Reduction (ROVER)".
"""

from __future__ import annotations

from collections.abc import Sequence

from shared.config import UserError

# What the alignment of NIST's scorer charges.
SUBSTITUTION, INSERTION, DELETION = 4, 3, 3


def rover(
    hypotheses: Sequence[str],
    confidences: Sequence[float] | None = None,
    *,
    vote_share: float = 1.0,
    null_confidence: float = 0.0,
) -> str:
    """The text that hypotheses, best first, vote for word by word; repeats of a hypothesis have no vote.

    A word's score in its slot is α · (votes / hypotheses) + (1 − α) · its highest confidence, with α = `vote_share`
    (section 2.2); `confidences` [N] are those of the hypotheses, between 0 and 1, and `null_confidence` that of there
    being no word. Of words with equal scores the one in the earliest hypothesis wins.
    """
    if isinstance(hypotheses, str) or not hypotheses:
        raise UserError("voting needs a list of at least one hypothesis")
    if not 0 <= vote_share <= 1:
        raise UserError(f"vote_share must lie between 0 and 1, not {vote_share}")
    if confidences is None:
        if vote_share < 1:
            raise UserError("a vote_share below 1 weighs confidences: give one for each hypothesis")
        confidences = [0.0] * len(hypotheses)
    if len(confidences) != len(hypotheses):
        raise UserError(f"there are {len(hypotheses)} hypotheses, but {len(confidences)} confidences")
    highest: dict[tuple[str, ...], float] = {}
    for text, confidence in zip(hypotheses, confidences, strict=True):
        words = tuple(text.split())
        highest[words] = max(confidence, highest.get(words, confidence))
    sure = list(highest.values())
    chosen = []
    for slot in confusion_network(list(highest)):
        scores = {}
        for word in dict.fromkeys(slot):
            votes = [place for place, each in enumerate(slot) if each == word]
            confidence = max(sure[place] for place in votes) if word else null_confidence
            scores[word] = vote_share * len(votes) / len(slot) + (1 - vote_share) * confidence
        chosen.append(max(scores, key=scores.__getitem__))
    return " ".join(word for word in chosen if word)


def rover_all(
    nbest: Sequence[Sequence[str]],
    confidences: Sequence[Sequence[float]] | None = None,
    *,
    vote_share: float = 1.0,
    null_confidence: float = 0.0,
) -> list[str]:
    """`rover` of each list; `confidences` [U][N] fit the lists."""
    sure = [None] * len(nbest) if confidences is None else confidences
    if len(sure) != len(nbest):
        raise UserError(f"there are {len(nbest)} lists, but confidences of {len(sure)}")
    return [
        rover(hypotheses, each, vote_share=vote_share, null_confidence=null_confidence)
        for hypotheses, each in zip(nbest, sure, strict=True)
    ]


def confusion_network(hypotheses: Sequence[Sequence[str]]) -> list[list[str]]:
    """Slots in the order of the text, each with one word of every hypothesis, "" where one has none there.

    `hypotheses` are lists of words. The first one's words are the first slots; each further one is aligned with the
    slots so far at least cost, where a word fits any slot that holds it and no word fits any slot that holds ""
    (section 2.1). Words that fit nowhere open slots of their own.
    """
    slots = [[word] for word in hypotheses[0]]
    for number, words in enumerate(hypotheses[1:], start=1):
        aligned = []
        for slot, word in align(slots, words):
            aligned.append([*(slot or [""] * number), word])
        slots = aligned
    return slots


def align(slots: Sequence[Sequence[str]], words: Sequence[str]) -> list[tuple[Sequence[str] | None, str]]:
    """Pairs of slot and word in order, at least cost: None for a word without a slot, "" for a slot without a word."""
    # Equal ends, most of most lists, can be paired at once without loss, but for slots that may also stay without a
    # word: those can be passed over for nothing, so that a later one may be the better pair.
    start, end = 0, 0
    shorter = min(len(slots), len(words))
    while start < shorter and _surely(slots[start], words[start]):
        start += 1
    while end < shorter - start and _surely(slots[-1 - end], words[-1 - end]):
        end += 1
    head = list(zip(slots[:start], words[:start], strict=True))
    tail = list(zip(slots[len(slots) - end :], words[len(words) - end :], strict=True))
    return head + _align(slots[start : len(slots) - end], words[start : len(words) - end]) + tail


def _surely(slot: Sequence[str], word: str) -> bool:
    return word in slot and "" not in slot


def _align(slots: Sequence[Sequence[str]], words: Sequence[str]) -> list[tuple[Sequence[str] | None, str]]:
    passing = [0 if "" in slot else DELETION for slot in slots]
    # costs[i][j]: of the first i slots and the first j words.
    costs = [[INSERTION * j for j in range(len(words) + 1)]]
    for slot, passed in zip(slots, passing, strict=True):
        above = costs[-1]
        row = [above[0] + passed]
        for j, word in enumerate(words):
            paired = above[j] + (0 if word in slot else SUBSTITUTION)
            row.append(min(paired, above[j + 1] + passed, row[j] + INSERTION))
        costs.append(row)
    i, j = len(slots), len(words)
    pairs: list[tuple[Sequence[str] | None, str]] = []
    while i or j:
        if i and j and costs[i][j] == costs[i - 1][j - 1] + (0 if words[j - 1] in slots[i - 1] else SUBSTITUTION):
            i, j = i - 1, j - 1
            pairs.append((slots[i], words[j]))
        elif i and costs[i][j] == costs[i - 1][j] + passing[i - 1]:
            i -= 1
            pairs.append((slots[i], ""))
        else:
            j -= 1
            pairs.append((None, words[j]))
    return pairs[::-1]
