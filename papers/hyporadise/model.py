"""Generative error correction: a model that reads a whole list of hypotheses and writes the transcript.

Given Y_N = (y^(1), …, y^(N)) in the order of scores, M(Y_N) → y* is trained on L = Σ_t −log P(y*_t | y*_<t, Y_N)
(section 4 of the paper). A corrector has a network, the tokens of its training pairs, a loss, and `correct`. Here are

- `PointerGenerator`, an encoder–decoder over words that knows the rank of each word's hypothesis and can point at it;
- `PromptedLanguageModel`, a decoder-only model over byte pairs, whose prompt are the hypotheses; without hypotheses it
  is the language model that re-ranks.

T5 and LLaMA are in `checkpoints.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from shared.data.nbest import END, START, UNK, EncodedNBest, WordVocabulary
from shared.data.text import BytePairTokenizer
from shared.evaluation.language import IGNORED
from shared.nn import Attention, LanguageModel, ShortConvolution
from shared.nn.beam_search import beam_search, language_model_step, sample
from shared.nn.sequence_to_sequence import SequenceToSequence, sequence_loss

from .batching import in_order, of_equal_length, pad_rows
from .config import DecoderOnly, Decoding, EncoderDecoder, Reranker


class Corrector(Protocol):
    """What training and decoding need of a model."""

    network: nn.Module

    def pairs(self, nbest: Sequence[Sequence[str]], references: Sequence[str]) -> Pairs: ...

    def loss(self, network: nn.Module, pairs: Any, rows: Tensor, label_smoothing: float) -> Tensor:
        """Mean loss a target token of some pairs."""
        ...

    def correct(self, nbest: Sequence[Sequence[str]], decoding: Decoding) -> list[str]:
        """Transcripts of lists."""
        ...


class Pairs(Protocol):
    """Pairs as tokens; `lengths` [pairs] are those that pairs are grouped by, `counted` [pairs] the target tokens."""

    lengths: Tensor
    counted: Tensor


# --- Encoder and decoder ----------------------------------------------------------------------------------------------


class WordPairs:
    """Lists and transcripts as numbers of words."""

    def __init__(self, encoded: EncodedNBest, device: torch.device) -> None:
        self.source, self.ranks, self.positions = (
            torch.from_numpy(part).to(device) for part in (encoded.source, encoded.ranks, encoded.positions)
        )
        self.target = None if encoded.target is None else torch.from_numpy(encoded.target).to(device)
        self.extra = encoded.extra
        self.lengths = (self.source != 0).sum(1).cpu()
        targets = self.lengths if self.target is None else (self.target != 0).sum(1).cpu() - 1
        self.counted = targets

    def batch(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Source, ranks and positions of some lists, without columns that are padding in all of them."""
        width = max(1, int(self.lengths[rows].max()))
        rows = rows.to(self.source.device)
        return self.source[rows, :width], self.ranks[rows, :width], self.positions[rows, :width]


class PointerGenerator:
    """The encoder–decoder: with `first_only` it reads y^(1) alone, without `copy` it can only write its vocabulary."""

    def __init__(
        self,
        settings: EncoderDecoder,
        vocabulary: WordVocabulary,
        num_hypotheses: int,
        *,
        first_only: bool = False,
        copy: bool = True,
    ) -> None:
        self.settings, self.vocabulary = settings, vocabulary
        self.num_hypotheses, self.copies = 1 if first_only else num_hypotheses, copy
        self.network = SequenceToSequence(
            len(vocabulary),
            settings.hidden_size,
            settings.num_heads,
            settings.num_layers,
            settings.num_layers,
            settings.feed_forward_size,
            num_ranks=self.num_hypotheses,
            copy=copy,
            dropout=settings.dropout,
        )

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    def pairs(self, nbest: Sequence[Sequence[str]], references: Sequence[str] | None = None) -> WordPairs:
        """Tokens of lists, and of transcripts where given."""
        encoded = self.vocabulary.encode_nbest(
            nbest,
            references,
            max_source=self.settings.max_source,
            max_target=self.settings.max_target,
            num_hypotheses=self.num_hypotheses,
        )
        return WordPairs(encoded, self.device)

    def loss(self, network: nn.Module, pairs: WordPairs, rows: Tensor, label_smoothing: float) -> Tensor:
        """Mean cross-entropy, label-smoothed, of the transcript's words and its end."""
        source, ranks, positions = pairs.batch(rows)
        width = int(pairs.counted[rows].max()) + 1
        target = pairs.target[rows.to(source.device), :width]
        if not self.copies:
            target = target.masked_fill(target >= len(self.vocabulary), UNK)
        return sequence_loss(
            network,
            source,
            target,
            ranks=ranks,
            positions=positions,
            label_smoothing=label_smoothing,
            vocab_size=len(self.vocabulary),
        )

    @torch.no_grad()
    def correct(self, nbest: Sequence[Sequence[str]], decoding: Decoding) -> list[str]:
        """Transcripts by beam search over the words of vocabulary and lists."""
        self.network.eval()
        pairs = self.pairs(nbest)
        out = [""] * len(nbest)
        words = torch.tensor([len(each[0].split()) for each in nbest])
        for rows in in_order(pairs.lengths, decoding.batch_size):
            length = longest_answer(int(words[rows].max()), decoding)
            source, ranks, positions = pairs.batch(rows)
            memory = self.network.encode(source, ranks, positions)
            start = torch.full((len(rows),), START, device=source.device)
            tokens = _decode(self.network.step_function(memory), start, END, length, None, decoding)
            for row, numbers in zip(rows.tolist(), tokens, strict=True):
                out[row] = self.vocabulary.decode(numbers, pairs.extra[row])
        return out


# --- Decoder alone ----------------------------------------------------------------------------------------------------

# Behind the byte pairs.
SPECIAL_TOKENS = ("end", "next hypothesis", "transcript")


class TokenPairs:
    """Prompts and answers as one sequence each, and where its answer begins."""

    def __init__(self, prompts: list[list[int]], answers: list[list[int]], *, count_prompt: bool) -> None:
        self.tokens = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
        self.begins = [1 if count_prompt else len(prompt) for prompt in prompts]
        self.lengths = torch.tensor([len(each) for each in self.tokens])
        self.counted = self.lengths - torch.tensor(self.begins)

    def batch(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs and labels [rows, longest - 1]; labels of prompts and padding do not count."""
        chosen = rows.tolist()
        tokens = pad_rows([self.tokens[row] for row in chosen], 0)
        places = torch.arange(tokens.shape[1])
        begins = torch.tensor([self.begins[row] for row in chosen])[:, None]
        counts = (places >= begins) & (places < self.lengths[rows][:, None])
        return tokens[:, :-1], tokens.masked_fill(~counts, IGNORED)[:, 1:]


class ConvolvedAttention(nn.Module):
    """Attention over tokens that have looked at those just before them: x + convolution(x), `[B, T, d]` to the same.

    A token is copied by finding where the one before it has stood (Olsson et al. 2022); a convolution puts both in one
    place, so that one layer of attention is enough. Called as any token mixer is.
    """

    def __init__(self, hidden_size: int, num_heads: int, width: int) -> None:
        super().__init__()
        self.convolution = ShortConvolution(hidden_size, width)
        self.attention = Attention(hidden_size, num_heads)

    def forward(self, x: Tensor, state: Any = None, keep_state: bool = False) -> tuple[Tensor, Any]:
        before, past = state or (None, None)
        near, before = self.convolution(x, before, keep_state)
        mixed, past = self.attention(x + near, past, keep_state)
        return mixed, (before, past) if keep_state else None


def mixer_of(settings: DecoderOnly | Reranker) -> nn.Module:
    """The token mixer of one layer."""
    if settings.convolution_width:
        return ConvolvedAttention(settings.hidden_size, settings.num_heads, settings.convolution_width)
    return Attention(settings.hidden_size, settings.num_heads)


class PromptedLanguageModel:
    """A decoder-only model: hypotheses with separators between, a mark, then the transcript and its end."""

    def __init__(
        self,
        settings: DecoderOnly | Reranker,
        tokenizer: BytePairTokenizer,
        *,
        max_tokens: int,
        num_hypotheses: int,
        count_prompt: bool = False,
    ) -> None:
        self.tokenizer, self.max_tokens, self.num_hypotheses = tokenizer, max_tokens, num_hypotheses
        self.count_prompt = count_prompt
        self.end, self.separator, self.mark = (tokenizer.vocab_size + place for place in range(len(SPECIAL_TOKENS)))
        self.network = LanguageModel(
            tokenizer.vocab_size + len(SPECIAL_TOKENS),
            settings.hidden_size,
            settings.num_layers,
            lambda _: mixer_of(settings),
            feed_forward_size=settings.feed_forward_size,
        )

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    def encode(self, text: str) -> list[int]:
        """Tokens of a text, its first word as one inside a sentence."""
        return self.tokenizer.encode(f" {text}").tolist()

    def prompt(self, hypotheses: Sequence[str], reserved: int = 0) -> list[int]:
        """Tokens of a list and the mark; hypotheses that do not leave room for `reserved` tokens are left out."""
        tokens: list[int] = [self.end]
        for place, hypothesis in enumerate(hypotheses[: self.num_hypotheses]):
            more = ([self.separator] if place else []) + self.encode(hypothesis)
            if place and len(tokens) + len(more) + 1 + reserved > self.max_tokens:
                break
            tokens += more
        return [*tokens, self.mark]

    def pairs(self, nbest: Sequence[Sequence[str]], references: Sequence[str]) -> TokenPairs:
        """Tokens of lists and transcripts; a transcript is never cut."""
        answers = [[*self.encode(reference), self.end] for reference in references]
        prompts = [self.prompt(each, len(answer)) for each, answer in zip(nbest, answers, strict=True)]
        return TokenPairs(prompts, answers, count_prompt=self.count_prompt)

    def loss(self, network: nn.Module, pairs: TokenPairs, rows: Tensor, label_smoothing: float) -> Tensor:
        """Mean cross-entropy of the transcript's tokens and its end, and of the prompt's if these count."""
        inputs, labels = (part.to(self.device) for part in pairs.batch(rows))
        features, _ = network.features(inputs)
        counts = labels != IGNORED
        # Logits of what counts alone: a prompt is five times as long as its answer.
        logits = functional.linear(features[counts], network.embedding.weight)
        return functional.cross_entropy(logits.float(), labels[counts], label_smoothing=label_smoothing)

    @torch.no_grad()
    def correct(self, nbest: Sequence[Sequence[str]], decoding: Decoding) -> list[str]:
        """Transcripts by beam search, lists whose prompts are of one length together."""
        self.network.eval()
        prompts = [self.prompt(each) for each in nbest]
        lengths = torch.tensor([len(each) for each in prompts])
        out = [""] * len(nbest)
        for rows in of_equal_length(lengths, decoding.batch_size):
            tokens = torch.tensor([prompts[row] for row in rows.tolist()], device=self.device)
            _, state = self.network(tokens[:, :-1], keep_state=True)
            length = longest_answer(max(len(self.encode(nbest[row][0])) for row in rows.tolist()), decoding)
            step = language_model_step(self.network)
            numbers = _decode(step, tokens[:, -1], self.end, length, state, decoding)
            for row, each in zip(rows.tolist(), numbers, strict=True):
                out[row] = self.read(each)
        return out

    def read(self, tokens: Sequence[int]) -> str:
        """The text up to the end; what is no text in it is left out, and so are bytes that are no letter together."""
        written = list(tokens)
        if self.end in written:
            written = written[: written.index(self.end)]
        text = self.tokenizer.decode([token for token in written if token < self.tokenizer.vocab_size])
        return " ".join(text.replace("\N{REPLACEMENT CHARACTER}", "").split())

    @torch.no_grad()
    def log_probs(self, texts: Sequence[str], batch_size: int) -> np.ndarray:
        """Natural log-probabilities of texts and their end, without a list before them, float64 [texts]."""
        self.network.eval()
        pairs = self.pairs([()] * len(texts), texts)
        out = torch.zeros(len(texts), dtype=torch.float64)
        for rows in in_order(pairs.lengths, batch_size):
            inputs, labels = (part.to(self.device) for part in pairs.batch(rows))
            chosen = self.network(inputs).float().log_softmax(-1)
            values = chosen.gather(-1, labels.clamp_min(0)[..., None])[..., 0]
            out[rows] = values.masked_fill(labels == IGNORED, 0).double().sum(1).cpu()
        return out.numpy()


def longest_answer(first: int, decoding: Decoding) -> int:
    """Tokens at which a search ends: no transcript is much longer than the `first` hypothesis of its list."""
    return min(decoding.max_new_tokens, 6 + first * 5 // 4)


def _decode(step: Any, start: Tensor, end: int, length: int, state: Any, decoding: Decoding) -> list[list[int]]:
    """Tokens of the best continuation of each row."""
    if decoding.sample:
        generator = torch.Generator(start.device).manual_seed(0)
        options = {"temperature": decoding.temperature, "top_k": decoding.top_k, "top_p": decoding.top_p}
        beams = sample(step, start, end_token=end, max_length=length, state=state, generator=generator, **options)
    else:
        beams = beam_search(
            step,
            start,
            end_token=end,
            beam_size=decoding.beam_size,
            max_length=length,
            length_penalty=decoding.length_penalty,
            state=state,
        )
    return beams.tokens[:, 0].tolist()
