"""Finding models by name: house models, local transformers folders, and what can be wrong with them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from shared.config import UserError
from shared.lm import HouseConfig, HouseModel, WordTokenizer, house_folder, load_lm
from shared.lm.decoder import adapt
from shared.lm.tests.families import make, prompts

WORDS = ["<bos>", "the", "code", "of", "Ann", "c1"]


@pytest.fixture
def house_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("REPRISE_HOUSE_LM", str(tmp_path))
    HouseModel(HouseConfig.of_size("S", len(WORDS))).save(tmp_path / "skills" / "S" / "seed2", WORDS)
    return tmp_path


def test_a_house_model_is_found_by_its_spec_and_by_its_folder(house_models: Path) -> None:
    lm = load_lm("house:skills:S:2")
    tokens = lm.encode("<bos> the code of Ann")
    assert tokens.tolist() == [0, 1, 2, 3, 4]
    assert lm.decode(tokens) == "<bos> the code of Ann"
    torch.testing.assert_close(lm.forward(tokens).logits, lm.model(tokens[None]))
    assert not any(parameter.requires_grad for parameter in lm.model.parameters())
    again = load_lm(house_models / "skills" / "S" / "seed2")
    torch.testing.assert_close(again.forward(tokens).logits, lm.forward(tokens).logits)
    assert load_lm("house:skills:S:2", dtype=torch.bfloat16).forward(tokens).logits.dtype == torch.bfloat16


def test_where_house_models_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("REPRISE_HOUSE_LM", raising=False)
    folder = house_folder("skills", "M", 1)
    assert folder.parts[-6:] == ("pipelines", "house_lm", "models", "skills", "M", "seed1")


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "qwen2", "mixtral"])
def test_a_transformers_folder_is_loaded_and_checked(name: str, tmp_path: Path) -> None:
    model = make(name)
    model.save_pretrained(tmp_path)
    lm = load_lm(tmp_path)
    torch.testing.assert_close(lm.forward(prompts()).logits, model(prompts()).logits)
    with pytest.raises(UserError, match="has no tokenizer: pass token ids"):
        lm.encode("a word")


def test_a_tokenizer_of_transformers_names_the_words_it_lacks(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    make("llama").save_pretrained(tmp_path)
    words = {word: index for index, word in enumerate(["<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(tmp_path)
    lm = load_lm(tmp_path)
    assert lm.encode("the code").tolist() == [2, 3]
    assert lm.decode(lm.encode("the code")) == "the code"
    with pytest.raises(UserError, match="does not know 'Bob', 'né'"):
        lm.encode("the code of Bob né Ann")
    assert lm.encode("of Bob", allow_unknown=True).tolist() == [4, 0]


def test_words_outside_a_closed_vocabulary() -> None:
    with pytest.raises(UserError, match="does not hold 'Bob'"):
        WordTokenizer(WORDS).encode("the code of Bob")
    open_vocabulary = WordTokenizer(["<unk>", *WORDS])
    assert open_vocabulary.encode("code Bob", add_special_tokens=True) == [1, 3, 0]


def test_unknown_models_are_named(house_models: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no trained model house:arith:S:0 at .*arith/S/seed0: train it"):
        load_lm("house:arith:S:0")
    for spec in ("house:skills:S", "house:skills:Z:0", "house:skills:S:one"):
        with pytest.raises(UserError, match="write house:<mixture>:<size>:<seed>"):
            load_lm(spec)
    with pytest.raises(UserError, match=r"no language model 'nobody/no-such-model'.*local_files_only=False"):
        load_lm("nobody/no-such-model")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"holds no config\.json"):
        load_lm(tmp_path / "empty")


def test_a_folder_without_weights_is_named(house_models: Path, tmp_path: Path) -> None:
    make("llama").config.save_pretrained(tmp_path / "llama")
    with pytest.raises(UserError, match=r"the weights of .*llama can't be loaded"):
        load_lm(tmp_path / "llama")
    (house_models / "skills" / "S" / "seed2" / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"model\.safetensors is missing"):
        load_lm("house:skills:S:2")


def test_a_family_without_adapter_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bloom", "vocab_size": 10}))
    with pytest.raises(UserError, match="of type 'bloom', which has no adapter: supported are house, gpt2"):
        load_lm(tmp_path)
    with pytest.raises(UserError, match="models of type 'Linear' have no adapter"):
        adapt(torch.nn.Linear(1, 1))


def test_a_checkpoint_that_its_adapter_does_not_understand_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from shared.lm import decoder

    def forgetful(model: torch.nn.Module) -> decoder.Decoder:
        parts = decoder._gpt2(model)
        parts.layers[1].scale *= 1.5
        return parts

    make("gpt2").save_pretrained(tmp_path)
    monkeypatch.setitem(decoder.FAMILIES, "gpt2", forgetful)
    with pytest.raises(UserError, match="logits differ from transformers' own"):
        load_lm(tmp_path)


def test_importing_the_package_is_light() -> None:
    import subprocess

    heavy = ("transformers", "mlflow", "dvc", "datasets", "matplotlib", "pandas", "lightning_fabric")
    code = f"import sys, shared.lm; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
