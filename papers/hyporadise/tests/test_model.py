"""Correctors: what they read, what counts in their losses, and that they learn to correct."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from shared.data.nbest import WordVocabulary
from shared.data.text import BytePairTokenizer
from shared.evaluation.language import IGNORED

from ..baselines import best_of, choose_weight, rerank, rerank_scores, voted
from ..batching import Groups, in_order, of_equal_length, pad_rows
from ..config import CorrectorTraining, DecoderOnly, Decoding, EncoderDecoder
from ..data import Lists
from ..model import ConvolvedAttention, PointerGenerator, PromptedLanguageModel, longest_answer
from ..train import choose_demonstrations, fit_corrector

WORDS = ("the", "cat", "sat", "on", "a", "mat", "dog", "ran", "to", "fog", "log")
TRAINING = CorrectorTraining(epochs=2, batch_size=8, learning_rate=1e-2, warmup_steps=5)
DECODING = Decoding(beam_size=2, max_new_tokens=12, batch_size=4)
SETTINGS = EncoderDecoder(
    hidden_size=32, num_heads=2, num_layers=1, feed_forward_size=32, dropout=0.0, training=TRAINING
)
LANGUAGE = {
    "hidden_size": 32,
    "num_heads": 2,
    "num_layers": 1,
    "vocabulary_size": 300,
    "low_rank_learning_rate": 1e-2,
    "pretraining": {"steps": 1, "batch_size": 1, "learning_rate": 1e-3},
    "training": TRAINING,
}


def lists_of(pairs: list[tuple[list[str], str]]) -> Lists:
    nbest, references = [list(a) for a, _ in pairs], [b for _, b in pairs]
    return Lists(nbest, references, [[0.0] * len(each) for each in nbest], ["x"] * len(pairs))


def first_of(lists: Lists, count: int) -> Lists:
    return Lists(lists.nbest[:count], lists.references[:count], lists.scores[:count], lists.domains[:count])


def confusions(count: int, seed: int = 0) -> Lists:
    """Lists in which `dog` is always heard as `fog`, or in the second hypothesis as `log`: no list contains it."""
    generator = torch.Generator().manual_seed(seed)
    pairs = []
    for _ in range(count):
        words = [WORDS[i] for i in torch.randint(9, (4,), generator=generator).tolist()]
        heard = [[{"dog": wrong}.get(word, word) for word in words] for wrong in ("fog", "log")]
        pairs.append(([" ".join(each) for each in heard], " ".join(words)))
    return lists_of(pairs)


@pytest.fixture(scope="module")
def tokenizer() -> BytePairTokenizer:
    return BytePairTokenizer.train(" " + " ".join(WORDS * 20), 300)


def test_groups_have_every_example_once_an_epoch_and_like_lengths() -> None:
    lengths = torch.arange(100).flip(0) % 50
    groups = Groups(lengths, 8, seed=1)
    for epoch in (0, 1):
        rows = [groups.rows(epoch, group) for group in range(len(groups))]
        assert sorted(torch.cat(rows).tolist()) == list(range(100))
        assert max(int(lengths[each].max() - lengths[each].min()) for each in rows) < 25
    assert not torch.equal(Groups(lengths, 8, 1).rows(0, 3), Groups(lengths, 8, 2).rows(0, 3))
    assert torch.equal(Groups(lengths, 8, 1).rows(1, 3), groups.rows(1, 3))


def test_groups_of_decoding() -> None:
    lengths = torch.tensor([3, 1, 3, 2, 1])
    assert [each.tolist() for each in in_order(lengths, 2)] == [[1, 4], [3, 0], [2]]
    assert [each.tolist() for each in of_equal_length(lengths, 8)] == [[1, 4], [3], [0, 2]]
    assert pad_rows([[1, 2], [3]], 0, left=True).tolist() == [[1, 2], [0, 3]]
    assert pad_rows([[1, 2], []], -1).tolist() == [[1, 2], [-1, -1]]


def test_a_generator_learns_a_word_that_no_list_contains() -> None:
    torch.manual_seed(0)
    vocabulary = WordVocabulary.build([*WORDS])
    corrector = PointerGenerator(SETTINGS, vocabulary, 2)
    train, test = confusions(640), confusions(20, seed=1)
    fit_in(corrector, train)
    written = corrector.correct(test.nbest, DECODING)
    right = sum(a == b for a, b in zip(written, test.references, strict=True))
    assert right >= 18
    assert any("dog" in reference for reference in test.references)


def fit_in(corrector: PointerGenerator | PromptedLanguageModel, train: Lists) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        fit_corrector(corrector, {"train": train, "validation": first_of(train, 8)}, TRAINING, Path(folder), 0, "test")


def test_words_outside_of_the_vocabulary_are_copied_and_only_with_a_pointer() -> None:
    torch.manual_seed(0)
    vocabulary = WordVocabulary.build(["the cat"])
    nbest, references = [["the zyx cat", "the zyx"]], ["the zyx cat"]
    for copies in (True, False):
        corrector = PointerGenerator(SETTINGS, vocabulary, 2, copy=copies)
        train = lists_of(list(zip(nbest * 120, references * 120, strict=True)))
        fit_in(corrector, train)
        assert ("zyx" in corrector.correct(nbest, DECODING)[0].split()) is copies


def test_the_first_hypothesis_alone_is_read_where_that_is_asked_for() -> None:
    vocabulary = WordVocabulary.build([*WORDS])
    one = PointerGenerator(SETTINGS, vocabulary, 2, first_only=True)
    both = PointerGenerator(SETTINGS, vocabulary, 2)
    nbest = [["the cat", "a cat"]]
    assert one.pairs(nbest).source.shape[1] == 2
    assert both.pairs(nbest).ranks[0].tolist() == [1, 1, 1, 2, 2]


def test_the_prompt_holds_the_list_and_the_label_its_answer(tokenizer: BytePairTokenizer) -> None:
    model = PromptedLanguageModel(DecoderOnly(**LANGUAGE), tokenizer, max_tokens=64, num_hypotheses=2)
    pairs = model.pairs([["the cat", "a cat", "no"]], ["the cat"])
    answer = [*model.encode("the cat"), model.end]
    prompt = [model.end, *model.encode("the cat"), model.separator, *model.encode("a cat"), model.mark]
    assert pairs.tokens == [prompt + answer]
    inputs, labels = pairs.batch(torch.tensor([0]))
    assert inputs[0].tolist() == (prompt + answer)[:-1]
    assert labels[0].tolist() == [IGNORED] * (len(prompt) - 1) + answer
    assert int(pairs.counted[0]) == len(answer)
    assert model.read(answer) == "the cat"


def test_the_loss_may_cover_the_prompt_as_published(tokenizer: BytePairTokenizer) -> None:
    torch.manual_seed(0)
    settings = DecoderOnly(**LANGUAGE)
    masked = PromptedLanguageModel(settings, tokenizer, max_tokens=64, num_hypotheses=2)
    whole = PromptedLanguageModel(settings, tokenizer, max_tokens=64, num_hypotheses=2, count_prompt=True)
    whole.network.load_state_dict(masked.network.state_dict())
    nbest, references, rows = [["the cat", "a cat"], ["a dog", "the dog"]], ["the cat", "a dog"], torch.arange(2)
    for model in (masked, whole):
        pairs = model.pairs(nbest, references)
        total = 0.0
        for tokens, begin in zip(pairs.tokens, pairs.begins, strict=True):
            log_probs = model.network(torch.tensor([tokens[:-1]])).log_softmax(-1)[0]
            total -= sum(log_probs[place - 1, tokens[place]].item() for place in range(begin, len(tokens)))
        loss = model.loss(model.network, pairs, rows, 0.0).item()
        assert loss == pytest.approx(total / float(pairs.counted.sum()), rel=1e-4)
    assert int(whole.pairs(nbest, references).counted.sum()) > int(masked.pairs(nbest, references).counted.sum())


def test_a_long_list_loses_its_last_hypotheses_and_never_its_answer(tokenizer: BytePairTokenizer) -> None:
    model = PromptedLanguageModel(DecoderOnly(**LANGUAGE), tokenizer, max_tokens=12, num_hypotheses=3)
    pairs = model.pairs([["the cat sat", "a cat sat", "the mat sat"]], ["the cat sat"])
    assert pairs.tokens[0][-1] == model.end
    assert pairs.tokens[0].count(model.separator) < 2


def test_a_language_model_corrects_and_batches_do_not_matter(tokenizer: BytePairTokenizer) -> None:
    torch.manual_seed(0)
    model = PromptedLanguageModel(DecoderOnly(**LANGUAGE), tokenizer, max_tokens=64, num_hypotheses=2)
    train = lists_of([(["the fog ran", "the log ran"], "the dog ran"), (["a cat sat", "a mat sat"], "a cat sat")] * 150)
    fit_in(model, train)
    assert model.correct(train.nbest[:2], DECODING) == ["the dog ran", "a cat sat"]
    assert model.correct(train.nbest[1:2], DECODING) == ["a cat sat"]


def test_log_probs_are_those_of_the_text_and_its_end(tokenizer: BytePairTokenizer) -> None:
    torch.manual_seed(0)
    model = PromptedLanguageModel(DecoderOnly(**LANGUAGE), tokenizer, max_tokens=64, num_hypotheses=0)
    texts = ["the cat", "a dog ran to the mat"]
    for text, value in zip(texts, model.log_probs(texts, 8), strict=True):
        tokens = [model.end, model.mark, *model.encode(text), model.end]
        log_probs = model.network(torch.tensor([tokens])).log_softmax(-1)[0]
        expected = sum(log_probs[place - 1, tokens[place]].item() for place in range(2, len(tokens)))
        assert value == pytest.approx(expected, rel=1e-4)


def test_answers_are_bounded_by_the_first_hypothesis() -> None:
    assert longest_answer(8, Decoding()) == 16
    assert longest_answer(8, Decoding(max_new_tokens=3)) == 3


def test_re_ranking_chooses_by_weight_tuned_on_validation_lists() -> None:
    lists = Lists(
        [["a a", "b b"], ["a a", "b b"], ["b b", "a a"]],
        ["b b", "b b", "b b"],
        [[-1.0, -1.5]] * 3,
        ["x"] * 3,
    )

    def log_probs(texts: list[str]) -> object:
        import numpy as np

        return np.array([-1.0 if text == "b b" else -4.0 for text in texts])

    scores = rerank_scores(lists, log_probs)
    assert scores[1][0].tolist() == pytest.approx([-4 / 3, -1 / 3])
    assert best_of(scores, 0.0).tolist() == [0, 0, 0]
    assert best_of(scores, 1.0).tolist() == [1, 1, 0]
    assert choose_weight(lists, scores, (0.0, 0.1, 1.0, 5.0)) == 1.0
    texts, weights = rerank(lists, lists, log_probs, (0.0, 1.0))
    assert texts == ["b b"] * 3
    assert weights == {"x": 1.0}


def test_lists_without_scores_are_ranked_by_their_order() -> None:
    import numpy as np

    lists = lists_of([(["a", "b", "c"], "a")])
    acoustic, _ = rerank_scores(lists, lambda texts: np.zeros(len(texts)))
    assert acoustic[0].tolist() == pytest.approx([0.0, -np.log(2), -np.log(3)])


def test_voting_counts_repeats_once() -> None:
    lists = lists_of([(["a cat", "a cat", "a cat", "the mat", "the log"], "")])
    assert voted(lists)[0].split()[0] == "the"


def test_demonstrations_show_errors() -> None:
    lists = lists_of([(["a", "b"], "a"), (["c", "b"], "b"), (["d", "e"], "e")])
    assert [reference for _, reference in choose_demonstrations(lists, "x", 2)] == ["b", "e"]


def test_pretraining_text_says_sentences_as_often_as_asked(tokenizer: BytePairTokenizer) -> None:
    from types import SimpleNamespace

    from ..pretrain import text_windows

    model = PromptedLanguageModel(DecoderOnly(**LANGUAGE), tokenizer, max_tokens=64, num_hypotheses=2)
    sentences = ["the cat sat", "a dog ran"] * 100
    for repeats in (1, 3):
        windows = text_windows(SimpleNamespace(sentences=sentences), model, 23, repeats)
        said = [model.encode(sentence) for sentence in sentences]
        behind = {1: [model.end], 3: [model.separator, model.mark, model.end]}[repeats]
        stream = [t for each in said for last in behind for t in [*each, last]]
        expected = stream[:24]
        assert windows["train"][0].tolist() == expected
        assert (windows["train"] < 303).all()


def test_convolved_attention_goes_on_from_its_state() -> None:
    torch.manual_seed(0)
    mixer = ConvolvedAttention(16, 2, 3)
    x = torch.randn(2, 7, 16)
    whole, _ = mixer(x)
    first, state = mixer(x[:, :4], keep_state=True)
    second, state = mixer(x[:, 4:6], state, keep_state=True)
    third, _ = mixer(x[:, 6:], state, keep_state=True)
    torch.testing.assert_close(torch.cat([first, second, third], dim=1), whole)
    changed = x.clone()
    changed[:, 5:] += 1
    torch.testing.assert_close(mixer(changed)[0][:, :5], whole[:, :5])
