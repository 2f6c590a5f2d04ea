"""The path of Hugging Face models, on a tiny Llama with random weights and a word tokenizer, saved to disk."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from shared.config import Stage, UserError
from shared.lm.load import load_lm

from .. import needles
from ..config import Params
from ..detect import detect, load_scores
from ..evaluate import evaluate
from ..mask import mask

NEEDLE = {"needle": "the best is a park .", "question": "what is best ?", "real_needle": "a park"}
TEXT = "the sun is red . a dog ran to the sea . it was a day of rain . " * 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("llama")
    text = f"{TEXT} {NEEDLE['needle']} {needles.QUESTION.format(question=NEEDLE['question'])}"
    vocabulary = ["<unk>", "<s>", "</s>", *sorted(set(text.split()) | {"<book>", "</book>", "user", "\n"})]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    fast.chat_template = "{% for m in messages %}user {{ m['content'] }} {% endfor %}"
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def params(folder: Path, **checkpoints: object) -> Params:
    grid = {"lengths": [40, 60], "depths": [0, 50, 100]}
    return Params.model_validate(
        {
            "seeds": [0],
            "workers": 1,
            "test_groups": 3,
            "checkpoints": {
                "models": [{"name": "tiny-llama", "source": str(folder)}],
                "detection": grid,
                "masking": grid,
                "answer_buffer": 5,
                "max_new_tokens": 4,
                "dtype": "float32",
                **checkpoints,
            },
            "masking": {"models": ["tiny-llama"], "modes": ["uniform"], "counts": [1, 2], "draws": 2},
        }
    )


def haystack(folder: Path, needle: dict[str, str] = NEEDLE, chat: bool = False) -> needles.Haystack:
    return needles.Haystack(load_lm(folder), TEXT, needle, 0, chat=chat, buffer=5)


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("depth", [0, 50, 100])
def test_a_context_has_its_length_and_the_needle_its_place(folder: Path, chat: bool, depth: float) -> None:
    hay = haystack(folder, chat=chat)
    test = hay.test(60, depth)
    begin, end = test.context[0].tolist()
    assert end - begin == 60 - 5
    first, last = test.needle[0].tolist()
    text = hay.lm.decode(test.tokens[0]).split()
    assert text[first:last] == NEEDLE["needle"].split()
    assert text[test.start.item() : test.start.item() + 2] == ["a", "park"]
    assert first == begin or text[first - 1] == "." or depth == 100
    assert text[-1] == "Answer:"
    assert text[0] == ("user" if chat else "<s>")


def test_a_span_is_found_as_in_the_released_code() -> None:
    # Tokenized by itself, the span's first token is another one (9): 2 of 3 tokens in a window do.
    assert needles.find_span(np.array([1, 2, 3, 4, 5]), np.array([9, 4, 5])) == 2
    assert needles.find_span(np.array([1, 2, 3, 2, 3]), np.array([2, 3])) == 1
    with pytest.raises(UserError, match="does not hold"):
        needles.find_span(np.array([1, 2]), np.array([8]))


def test_bad_input_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match="does not know 'Größe'"):
        haystack(folder, NEEDLE | {"needle": "the Größe is a park ."})
    with pytest.raises(UserError, match="128 tokens at most"):
        haystack(folder).test(200, 50)
    with pytest.raises(UserError, match="no room for the needle"):
        haystack(folder).test(8, 50)
    with pytest.raises(UserError, match="no language model"):
        load_lm("nobody/has-this-model")


@pytest.fixture
def rouge(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stands in for the library where it is not installed: words in common, as in ROUGE-1 without stems."""
    try:
        import rouge_score  # noqa: F401
    except ImportError:

        def recall(reference: str, answer: str) -> float:
            return sum(word in answer.split() for word in reference.split()) / len(reference.split())

        monkeypatch.setattr(needles, "rouge_recall", recall)


def test_rouge_counts_stems() -> None:
    pytest.importorskip("rouge_score")
    assert needles.rouge_recall("eating a sandwich", "He eats sandwiches") == pytest.approx(2 / 3)
    assert needles.rouge_recall("a walk in the park", "walks in the park") == pytest.approx(0.8)
    assert needles.rouge_recall("a walk", "nothing") == 0


def test_without_the_library_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rouge_score", ModuleType("rouge_score"))
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(UserError, match="pip install rouge-score"):
        needles.rouge_recall("a", "a")


@pytest.mark.usefixtures("rouge")
def test_the_whole_analysis_runs_on_a_checkpoint(folder: Path, tmp_path: Path) -> None:
    import json

    (tmp_path / "data").mkdir()
    texts = {"needles": [NEEDLE] * 2, "haystacks": [TEXT] * 2}
    (tmp_path / "data" / "texts.json").write_text(json.dumps(texts))
    (tmp_path / "params.yaml").write_text("profile: here\nhere: {}\n")
    stage = Stage(tmp_path, "detect", "here", params(folder))
    detect(stage)
    found = load_scores(stage, "tiny-llama", 0)
    assert found["score"].shape == found["counted"].shape == (12, 2, 4)
    assert found["induction"].shape == (2, 4)
    mask(stage)
    evaluate(stage)
    scores = (tmp_path / "results" / "here" / "scores.csv").read_text()
    assert "tiny-llama/uniform" in scores
    for name in ("heads", "masking", "depth", "errors"):
        assert (tmp_path / "results" / "here" / f"{name}.png").stat().st_size > 1000


@pytest.mark.usefixtures("rouge")
def test_a_chat_model_needs_a_template(folder: Path) -> None:
    lm = load_lm(folder)
    lm.tokenizer.chat_template = None
    with pytest.raises(UserError, match="no chat template"):
        needles.Haystack(lm, TEXT, NEEDLE, 0, chat=True, buffer=5)
