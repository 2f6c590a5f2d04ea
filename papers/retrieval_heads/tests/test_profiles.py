"""The profiles of params.yaml, the ledger, the models that DVC trains for them, and the pipeline's inner workings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from shared.config import Stage, UserError, load_params, validate
from shared.data.house_lexicon import load_lexicon
from shared.lm.hooked import HookedLM
from shared.lm.hooks import Hook, mask_heads
from shared.lm.model import HouseConfig, HouseModel

from ..config import Params
from ..data import house_needles, house_tests
from ..detect import head_scores, recorded
from ..mask import conditions
from ..subjects import Subject, house_models, house_subject

FOLDER = Path(__file__).parents[1]
SECTIONS: dict[str, Any] = yaml.safe_load((FOLDER / "params.yaml").read_text(encoding="utf-8"))
PROFILES = [name for name in SECTIONS if name != "profile"]
LEDGER: list[dict[str, Any]] = yaml.safe_load((FOLDER / "paper.yaml").read_text(encoding="utf-8"))["claims"]
LEXICON = load_lexicon("embedded")


def params_of(profile: str) -> Params:
    return load_params(FOLDER / "params.yaml", Params, profile)[1]


@pytest.mark.parametrize("profile", PROFILES)
def test_every_profile_loads(profile: str) -> None:
    params = params_of(profile)
    if params.house:
        assert len(params.seeds) >= 3
        assert params.masking is not None
        assert {1, 2} <= set(params.masking.counts)


def test_every_claim_of_the_paper_has_a_row() -> None:
    ids = {claim["id"].partition("-")[0] for claim in LEDGER}
    assert ids == {f"C{number}" for number in range(1, 10)}
    for claim in LEDGER:
        assert set(claim.get("profiles", [])) <= set(PROFILES)


def test_the_published_grid_has_600_tests() -> None:
    grid = params_of("paper").checkpoints.detection
    assert len(grid.lengths) * len(grid.depths) * 3 == 600
    assert (grid.lengths[0], grid.lengths[-1]) == (1000, 50000)


@pytest.mark.parametrize("profile", PROFILES)
def test_dvc_knows_the_models_of_a_profile(profile: str) -> None:
    params = params_of(profile)
    stages = yaml.safe_load((FOLDER / "models" / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    of_size = stages["of-size"]
    trained = [
        f"../../../pipelines/house_lm/models/{model.name}/{params.house.size}/seed{seed}"
        for model, seed in house_models(Stage(FOLDER, "detect", profile, params))
        if params.house and params.house.stand_in_steps is None and model.two_steps is None
    ]
    if trained:
        size = of_size["foreach"][profile]
        assert sorted(path.replace("${item}", size) for path in of_size["do"]["deps"]) == sorted(trained)
    else:
        assert profile in stages["without"]["foreach"]


def test_impossible_params_are_refused() -> None:
    tiny = SECTIONS["tiny"]
    wrong = [
        ({"house": None, "masking": None}, "nothing to look at"),
        ({"masking": tiny["masking"] | {"models": ["gpt"]}}, "masking names gpt"),
        ({"house": tiny["house"] | {"size": "XL"}}, "no house model of size"),
    ]
    for change, message in wrong:
        with pytest.raises(UserError, match=message):
            validate(Params, tiny | change, "here")


def test_a_missing_model_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REPRISE_HOUSE_LM", str(tmp_path))
    params = params_of("small")
    stage = Stage(tmp_path, "detect", "small", params)
    with pytest.raises(UserError, match=r"no trained model house:skills:S:0.*train it with the stages"):
        house_subject(stage, params.house.models[0], 0, torch.device("cpu"))


def test_house_tests_are_the_same_again_and_differ_between_parts() -> None:
    house = params_of("tiny").house
    first, again = (dict(house_tests(house, 0, LEXICON)) for _ in range(2))
    assert first.keys() == again.keys()
    for name in first:
        assert all(np.array_equal(first[name][key], again[name][key]) for key in first[name])
    assert not np.array_equal(first["detection-skills"]["40/tokens"], first["masking-skills"]["40/tokens"])


# --- On a model with random weights -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def subject() -> Subject:
    torch.manual_seed(0)
    lm = HookedLM(HouseModel(HouseConfig.of_size("S", len(LEXICON.vocabulary))).requires_grad_(False))
    grid = params_of("tiny").house.models[0].grid
    batch = house_needles(grid, 40, 2, np.random.default_rng(0), LEXICON)
    stop = torch.from_numpy(LEXICON.encode(".")).long()
    return Subject("random", 0, lm, lambda part: iter([(batch, None)]), stop, 4, LEXICON.encode(LEXICON.content), 2)


def test_all_heads_are_scored_in_one_pass_as_one_by_one_from_whole_rows(subject: Subject) -> None:
    """A model that is made to say the answer: what each head then looks at is read from full attention patterns."""
    batch, _ = next(subject.tests("detection"))
    size = batch.answer.shape[1]
    said = iter([])

    def say(logits: torch.Tensor) -> torch.Tensor:
        forced = torch.full_like(logits, -1.0)
        return forced.scatter(2, next(said)[:, None, None], 1.0)

    class Forced:
        """Answers with the needle, whatever the weights say."""

        num_layers, num_heads, device = subject.lm.num_layers, subject.lm.num_heads, subject.lm.device

        def generate(self, tokens: torch.Tensor, max_new_tokens: int, hooks: Any = (), **options: Any) -> Any:
            nonlocal said
            said = iter([*batch.answer.T, *[subject.stop.expand(len(tokens))] * max_new_tokens])
            return subject.lm.generate(tokens, max_new_tokens, hooks=[*hooks, Hook("logits", None, say)], **options)

    found = head_scores(Subject("forced", 0, Forced(), subject.tests, subject.stop, 4, subject.words, 2))
    assert (found["recall"] == 1).all()
    whole = torch.cat([batch.tokens, batch.answer], dim=1)
    pattern = subject.lm.forward(whole, cache=["attn.pattern"]).kept.stack("attn.pattern")
    looked = pattern[..., batch.tokens.shape[1] - 1 : -1, :].argmax(dim=-1)  # [L, B, H, A]
    expected = torch.zeros(len(batch), subject.lm.num_layers, subject.lm.num_heads)
    for step in range(size):
        at = (batch.start + step)[None, :, None]
        expected += (looked[..., step] == at).permute(1, 0, 2) / size
    assert np.allclose(found["score"], expected.numpy())


@pytest.mark.parametrize("mode", ["uniform", "zero"])
def test_heads_are_masked_from_the_last_token_of_the_prompt_on(subject: Subject, mode: str) -> None:
    batch, _ = next(subject.tests("masking"))
    hooks = mask_heads([(0, 1), (3, 2)], mode)
    past = subject.lm.prefill(batch.tokens[:, :-1])
    made = subject.answer(batch.tokens, hooks=hooks, past=past).tokens[:, 0]
    last = [Hook(hook.point, hook.layer, hook.function, positions=[-1], heads=hook.heads) for hook in hooks]
    expected = subject.lm.forward(batch.tokens, hooks=last, logits="last").logits[:, -1].argmax(dim=-1)
    assert torch.equal(made, expected)


def test_without_a_success_no_head_retrieves() -> None:
    found = {"recall": np.array([0.5, 0.0]), "score": np.ones((2, 4, 4))}
    assert recorded(found).tolist() == np.zeros((1, 4, 4)).tolist()
    found["recall"][0] = 0.6
    assert recorded(found).tolist() == np.ones((1, 4, 4)).tolist()


def test_conditions_have_as_many_heads_and_the_same_draws_in_every_mode() -> None:
    rng = np.random.default_rng(0)
    score, induction = rng.random((4, 4)) / 20, rng.random((4, 4))
    masking = params_of("small").masking
    chosen = list(conditions(score, induction, masking, masking.modes, seed=1))
    assert len(chosen) == 3 * (1 + len(masking.counts) * (2 + 2 * masking.draws))
    assert all(len(set(condition.heads)) == len(condition.heads) for condition in chosen)
    drawn = {mode: [c.heads for c in chosen if c.mode == mode and c.masker == "random"] for mode in ("uniform", "zero")}
    assert drawn["uniform"] == drawn["zero"]
    assert len(set(drawn["uniform"])) > len(drawn["uniform"]) / 3
