"""Published models, by tiny ones with random weights on disk: both families, every tuning, prompts and padding."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.data import TensorDataset

from shared.config import UserError
from shared.evaluation.language import IGNORED
from shared.training import fit

from ..checkpoints import PublishedModel, count_parameters
from ..config import Checkpoint, CorrectorTraining, Decoding
from ..prompts import ANSWER, EXPLANATION, OTHERS, prompt, prompt_with_demonstrations

NBEST = [["the cat sat", "a cat sat"], ["the fog ran to the mat", "the log ran"]]
REFERENCES = ["the cat sat", "the dog ran to the mat"]
TRAINING = CorrectorTraining(epochs=1, batch_size=2, learning_rate=1e-2)
LLAMA = {
    "model_type": "llama",
    "vocab_size": 400,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
T5 = {
    "model_type": "t5",
    "vocab_size": 400,
    "d_model": 32,
    "d_kv": 16,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 2,
    "decoder_start_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A LLaMA and a T5 with random weights, and a tokenizer beside each, as `save_pretrained` leaves them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "<s>", "</s>"]
    texts = [prompt(nbest) for nbest in NBEST] * 4
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    out = {}
    for name, architecture, kind in (("llama", LLAMA, AutoModelForCausalLM), ("t5", T5, AutoModelForSeq2SeqLM)):
        torch.manual_seed(0)
        folder = tmp_path_factory.mktemp(name)
        options = dict(architecture)
        kind.from_config(AutoConfig.for_model(options.pop("model_type"), **options)).save_pretrained(folder)
        first = {"bos_token": "<s>"} if name == "llama" else {}
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", **first
        ).save_pretrained(folder)
        out[name] = str(folder)
    return out


def model_of(folders: dict[str, str], name: str, tuning: str = "full", **changes: object) -> PublishedModel:
    training = {} if tuning == "prompted" else {"training": changes.pop("training", TRAINING)}
    return PublishedModel(Checkpoint(pretrained=folders[name], tuning=tuning, **training, **changes))


def test_the_prompt_has_its_blocks_in_order() -> None:
    told = prompt(["best one", "other one", "third"])
    assert told.index("best one") < told.index(OTHERS) < told.index("other one. third.") < told.index(ANSWER)
    assert told.endswith(f"{ANSWER}\n")
    alone = prompt(["best one", "other one"], first_only=True)
    assert OTHERS not in alone
    assert "other" not in alone


def test_demonstrations_stand_before_the_question() -> None:
    told = prompt_with_demonstrations(NBEST[1], [(NBEST[0], REFERENCES[0])], explain_task=True)
    assert told.startswith(EXPLANATION)
    assert told.count(ANSWER) == 2
    assert told.endswith(prompt(NBEST[1]))
    assert prompt_with_demonstrations(NBEST[1], []) == prompt(NBEST[1])


@pytest.mark.parametrize("name", ["llama", "t5"])
@pytest.mark.parametrize("tuning", ["full", "low_rank"])
def test_the_loss_is_that_of_the_answer_whatever_the_padding(folders: dict[str, str], name: str, tuning: str) -> None:
    model = model_of(folders, name, tuning)
    model.network.eval()
    pairs = model.pairs(NBEST, REFERENCES)
    together = model.loss(model.network, pairs, torch.arange(2), 0.0).item()
    alone = [model.loss(model.network, pairs, torch.tensor([row]), 0.0).item() for row in (0, 1)]
    counts = pairs.counted.tolist()
    assert together == pytest.approx(sum(a * b for a, b in zip(alone, counts, strict=True)) / sum(counts), rel=1e-3)


def test_llama_is_padded_on_the_left_and_the_prompt_masked_or_not(folders: dict[str, str]) -> None:
    model = model_of(folders, "llama")
    pairs = model.pairs(NBEST, REFERENCES)
    inputs, labels = model.batch(pairs, torch.arange(2))
    short = int(pairs.lengths.argmin())
    assert int(inputs["attention_mask"][short, 0]) == 0
    assert inputs["attention_mask"][:, -1].tolist() == [1, 1]
    assert labels[:, -1].tolist() == [2, 2]
    assert (labels != IGNORED).sum(1).tolist() == pairs.counted.tolist()
    published = model_of(folders, "llama", training=TRAINING.model_copy(update={"loss_on_prompt": True}))
    _, whole = published.batch(published.pairs(NBEST, REFERENCES), torch.arange(2))
    assert (whole != IGNORED).sum(1).tolist() == pairs.lengths.tolist()
    assert pairs.prompts[0][0] == 1


def test_micro_batches_give_the_gradient_of_the_whole(folders: dict[str, str]) -> None:
    gradients = []
    for size in (None, 1):
        model = model_of(folders, "t5", training=TRAINING.model_copy(update={"micro_batch_size": size}))
        model.network.eval()
        loss = model.loss(model.network, model.pairs(NBEST, REFERENCES), torch.arange(2), 0.1)
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.network.parameters() if p.grad is not None]))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_low_rank_tuning_changes_nothing_at_first_and_keeps_only_what_it_trains(
    folders: dict[str, str], name: str, tmp_path: Path
) -> None:
    plain, model = model_of(folders, name), model_of(folders, name, "low_rank")
    rows = torch.arange(2)
    for each in (plain, model):
        each.network.eval()
    losses = [each.loss(each.network, each.pairs(NBEST, REFERENCES), rows, 0.0).item() for each in (plain, model)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    state = model.network.state_dict()
    assert state
    assert all("lora" in key for key in state)
    before = {key: value.clone() for key, value in state.items()}
    pairs = model.pairs(NBEST, REFERENCES)

    def loss(network: torch.nn.Module, batch: tuple[torch.Tensor, ...], _: object) -> dict[str, torch.Tensor]:
        return {"loss": model.loss(network, pairs, batch[0], 0.0)}

    settings = TRAINING.loop_settings(1).model_copy(update={"batch_size": 2})
    fit(model.network, TensorDataset(torch.arange(2)), loss, settings, directory=tmp_path, seed=0)
    assert any(not torch.equal(before[key], value) for key, value in model.network.state_dict().items())
    again = model_of(folders, name, "low_rank")
    fit(again.network, TensorDataset(torch.arange(2)), loss, settings, directory=tmp_path, seed=0)
    for key, value in again.network.state_dict().items():
        torch.testing.assert_close(value, model.network.state_dict()[key])


@pytest.mark.parametrize("name", ["llama", "t5"])
@pytest.mark.parametrize("decoding", [{"beam_size": 4}, {"sample": True}])
def test_transcripts_do_not_depend_on_the_batch(
    folders: dict[str, str], name: str, decoding: dict[str, object]
) -> None:
    model = model_of(folders, name)
    settings = Decoding(max_new_tokens=4, batch_size=2, **decoding)
    torch.manual_seed(0)
    together = model.correct(NBEST, settings)
    assert len(together) == 2
    assert all(text == text.lower() and "\n" not in text for text in together)
    if "beam_size" in decoding:
        assert model.correct(NBEST[1:], settings) == together[1:]


def test_prompting_trains_nothing(folders: dict[str, str]) -> None:
    model = model_of(folders, "llama", "prompted", demonstrations=(0, 1))
    assert not any(parameter.requires_grad for parameter in model.network.parameters())
    alone = model.encode_prompt(NBEST[1])
    model.demonstrations = [(NBEST[0], REFERENCES[0])]
    assert len(model.encode_prompt(NBEST[1])) > len(alone)
    assert len(model.correct(NBEST, Decoding(max_new_tokens=3, beam_size=2))) == 2


def test_long_prompts_lose_their_last_hypotheses(folders: dict[str, str]) -> None:
    whole = model_of(folders, "llama")
    size = len(whole.encode_prompt(NBEST[0] * 3))
    short = model_of(folders, "llama", max_tokens=size - 1)
    tokens = short.encode_prompt(NBEST[0] * 3)
    assert len(tokens) < size
    assert ANSWER in short.tokenizer.decode(tokens)


def test_what_is_no_model_is_named(folders: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="folder that holds both"):
        PublishedModel(Checkpoint(pretrained=str(tmp_path), tuning="full", training=TRAINING))


def test_parameters_of_an_architecture_are_counted_without_memory() -> None:
    total, trained = count_parameters(LLAMA)
    assert total == trained == 2 * 400 * 32 + 2 * (4 * 32 * 32 + 3 * 32 * 48 + 2 * 32) + 32
    low_rank = Checkpoint(pretrained="x", tuning="low_rank", training=TRAINING, low_rank={"rank": 4})
    assert count_parameters(LLAMA, low_rank) == (total, 2 * 4 * 2 * 4 * 32)
