"""Published T5 and LLaMA models as correctors: all weights tuned, low-rank updates, or prompted with examples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint as recomputed

from shared.config import UserError
from shared.evaluation.language import IGNORED
from shared.evaluation.transcription import strip_punctuation
from shared.nn.low_rank import add_low_rank

from .batching import in_order, pad_rows
from .config import Checkpoint, Decoding
from .prompts import prompt, prompt_with_demonstrations

MODEL_TYPES = ("t5", "llama")
Demonstrations = Sequence[tuple[Sequence[str], str]]


class TextPairs:
    """Prompts and answers as tokens of the model's own tokenizer."""

    def __init__(self, prompts: list[list[int]], answers: list[list[int]]) -> None:
        self.prompts, self.answers = prompts, answers
        self.lengths = torch.tensor([len(a) + len(b) for a, b in zip(prompts, answers, strict=True)])
        self.counted = torch.tensor([len(answer) for answer in answers])


class PublishedModel:
    """A T5 or LLaMA by folder or hub name, with its tokenizer, behind the interface of the other correctors."""

    def __init__(self, settings: Checkpoint, demonstrations: Demonstrations = ()) -> None:
        """Load the weights and make ready for the tuning that `settings` asks for."""
        self.settings, self.demonstrations = settings, demonstrations
        self.tokenizer, network = load_pretrained(settings)
        self.is_encoder_decoder = bool(network.config.is_encoder_decoder)
        self.pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0
        self.network = tunable(network, settings)

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    def encode(self, text: str, *, begins: bool) -> list[int]:
        """Tokens of a text, with a begin token where the model has one and the text `begins` a sequence."""
        tokens = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        first = self.tokenizer.bos_token_id
        return [first, *tokens] if begins and first is not None and not self.is_encoder_decoder else list(tokens)

    def encode_prompt(self, hypotheses: Sequence[str], reserved: int = 0) -> list[int]:
        """Tokens of a list's prompt; while they and `reserved` ones are too many, the last hypothesis is left out."""
        # T5 ends what it reads, too.
        end = [self.tokenizer.eos_token_id] if self.is_encoder_decoder else []
        reserved = 0 if self.is_encoder_decoder else reserved
        for count in range(len(hypotheses), 0, -1):
            told = self._prompt(hypotheses[:count])
            tokens = [*self.encode(told, begins=True), *end]
            if len(tokens) + reserved <= self.settings.max_tokens:
                break
        return tokens

    def _prompt(self, hypotheses: Sequence[str]) -> str:
        if self.settings.tuning != "prompted":
            return prompt(hypotheses, first_only=self.settings.first_only)
        return prompt_with_demonstrations(
            hypotheses,
            self.demonstrations,
            first_only=self.settings.first_only,
            explain_task=self.settings.explain_task,
        )

    def pairs(self, nbest: Sequence[Sequence[str]], references: Sequence[str]) -> TextPairs:
        """Tokens of prompts and transcripts, which end with the model's end token."""
        end = self.tokenizer.eos_token_id
        answers = [[*self.encode(reference, begins=False), end] for reference in references]
        prompts = [self.encode_prompt(each, len(answer)) for each, answer in zip(nbest, answers, strict=True)]
        return TextPairs(prompts, answers)

    def loss(self, network: nn.Module, pairs: TextPairs, rows: Tensor, label_smoothing: float) -> Tensor:
        """Mean cross-entropy a counted token; with a micro-batch size, activations of one micro-batch at a time."""
        size = self.settings.training.micro_batch_size if self.settings.training else None
        if size is None or len(rows) <= size:
            total, count = self._sum(network, pairs, label_smoothing, rows)
            return total / count
        parts = [
            recomputed(partial(self._sum, network, pairs, label_smoothing), part, use_reentrant=False)
            for part in rows.split(size)
        ]
        return sum(total for total, _ in parts) / sum(count for _, count in parts)

    def _sum(self, network: nn.Module, pairs: TextPairs, label_smoothing: float, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Summed cross-entropy of some pairs, and over how many tokens."""
        inputs, labels = self.batch(pairs, rows)
        logits = network(**inputs).logits
        if not self.is_encoder_decoder:
            logits, labels = logits[:, :-1], labels[:, 1:]
        total = functional.cross_entropy(
            logits.flatten(0, 1).float(), labels.flatten(), reduction="sum", label_smoothing=label_smoothing
        )
        return total, (labels != IGNORED).sum()

    def batch(self, pairs: TextPairs, rows: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """What the network is called with, and labels: those of the answer, or with `loss_on_prompt` of all tokens.

        LLaMA's sequences are padded on the left, T5's on the right.
        """
        prompts = [pairs.prompts[row] for row in rows.tolist()]
        answers = [pairs.answers[row] for row in rows.tolist()]
        if self.is_encoder_decoder:
            labels = pad_rows(answers, IGNORED).to(self.device)
            return self._read(prompts, left=False) | {"labels": labels}, labels
        together = [a + b for a, b in zip(prompts, answers, strict=True)]
        counts_prompt = self.settings.training is not None and self.settings.training.loss_on_prompt
        counted = together if counts_prompt else [[IGNORED] * len(a) + b for a, b in zip(prompts, answers, strict=True)]
        return self._read(together, left=True), pad_rows(counted, IGNORED, left=True).to(self.device)

    def _read(self, rows: list[list[int]], *, left: bool) -> dict[str, Tensor]:
        tokens = pad_rows(rows, self.pad, left=left)
        mask = pad_rows([[1] * len(row) for row in rows], 0, left=left)
        return {"input_ids": tokens.to(self.device), "attention_mask": mask.to(self.device)}

    @torch.no_grad()
    def correct(self, nbest: Sequence[Sequence[str]], decoding: Decoding) -> list[str]:
        """Transcripts, post-processed as in the published script: the first line, without punctuation and digits."""
        self.network.eval()
        prompts = [self.encode_prompt(each) for each in nbest]
        out = [""] * len(nbest)
        # The official script searches with four beams and leaves sampling off, where its other settings do nothing.
        options: dict[str, Any] = {"num_beams": decoding.beam_size, "length_penalty": decoding.length_penalty}
        if decoding.sample:
            options = {key: getattr(decoding, key) for key in ("temperature", "top_k", "top_p")}
        for rows in in_order(torch.tensor([len(each) for each in prompts]), decoding.batch_size):
            inputs = self._read([prompts[row] for row in rows.tolist()], left=not self.is_encoder_decoder)
            tokens = self.network.generate(
                **inputs,
                do_sample=decoding.sample,
                max_new_tokens=decoding.max_new_tokens,
                pad_token_id=self.pad,
                eos_token_id=self.tokenizer.eos_token_id,
                **options,
            )
            behind = 0 if self.is_encoder_decoder else inputs["input_ids"].shape[1]
            texts = self.tokenizer.batch_decode(tokens[:, behind:], skip_special_tokens=True)
            for row, text in zip(rows.tolist(), texts, strict=True):
                # A model that goes on with a further example has ended its answer before.
                out[row] = strip_punctuation(text.strip())
        return out


def load_pretrained(settings: Checkpoint) -> tuple[Any, nn.Module]:
    """Tokenizer and model of a folder or hub name; `UserError` says what is wrong with it."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

    name = settings.pretrained
    try:
        config = AutoConfig.from_pretrained(name)
        if config.model_type not in MODEL_TYPES:
            raise UserError(f"{name} is a {config.model_type!r}: choose a model of type {' or '.join(MODEL_TYPES)}")
        tokenizer = AutoTokenizer.from_pretrained(name)
        kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        network = kind.from_pretrained(name, **_options(settings))
    except (OSError, ValueError) as error:
        raise UserError(
            f"there is no model with a tokenizer at {name!r} ({str(error).splitlines()[0]}): 'pretrained' must be a "
            "folder that holds both, or a name on the Hugging Face hub"
        ) from None
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer at {name!r} has no end token, which a transcript must end with")
    return tokenizer, network


def _options(settings: Checkpoint) -> dict[str, Any]:
    """In 8 bit where that is asked for and possible, else in half precision on a GPU where weights are frozen."""
    frozen = settings.tuning != "full"
    if not torch.cuda.is_available() or not frozen:
        return {}
    if settings.eight_bit:
        import importlib.util

        if importlib.util.find_spec("bitsandbytes"):
            from transformers import BitsAndBytesConfig

            return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    return {"dtype": torch.bfloat16}


def tunable(network: nn.Module, settings: Checkpoint) -> nn.Module:
    """The network with what is tuned set to be trained: everything, low-rank updates of attention, or nothing."""
    network.config.use_cache = settings.tuning == "prompted"
    if settings.tuning == "full":
        return network
    if settings.tuning == "prompted":
        return network.requires_grad_(False)
    if getattr(network, "is_loaded_in_8bit", False):
        from peft import prepare_model_for_kbit_training

        network = prepare_model_for_kbit_training(network)
    add_low_rank(network, **settings.low_rank.model_dump())
    keep_trained_weights(network)
    return network


def keep_trained_weights(network: nn.Module) -> None:
    """Leave frozen weights out of checkpoints: thirteen billion of them would be written once an epoch."""
    trained = {name for name, parameter in network.named_parameters() if parameter.requires_grad}

    def drop(_: nn.Module, state: dict[str, Tensor], prefix: str, __: Any) -> None:
        for name in [name for name in state if name.startswith(prefix) and name[len(prefix) :] not in trained]:
            del state[name]

    def forgive(_: nn.Module, keys: Any) -> None:
        keys.missing_keys[:] = [key for key in keys.missing_keys if key.endswith(tuple(trained))]

    network.register_state_dict_post_hook(drop)
    network.register_load_state_dict_post_hook(forgive)


def count_parameters(architecture: dict[str, int | str | bool], low_rank: Checkpoint | None = None) -> tuple[int, int]:
    """Parameters of a published architecture, all and those that low-rank tuning trains, on the meta device."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    options = dict(architecture)
    config = AutoConfig.for_model(str(options.pop("model_type")), **options)
    build: Callable[[Any], nn.Module] = (
        AutoModelForSeq2SeqLM.from_config if config.is_encoder_decoder else AutoModelForCausalLM.from_config
    )
    with torch.device("meta"):
        network = build(config)
        total = sum(parameter.numel() for parameter in network.parameters())
        if low_rank is None:
            return total, total
        network = tunable(network, low_rank)
    return total, sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
