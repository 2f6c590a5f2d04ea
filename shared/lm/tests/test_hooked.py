"""Looking into a model of each family: the same logits, and hooks that do what they say."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from shared.config import UserError
from shared.lm import POINTS, Hook, HookedLM, mask_heads, mean_head_output
from shared.lm.hooks import WITHOUT_LAYER
from shared.lm.tests.families import EVERY, TRANSFORMERS, hooked, make, prompts


def points_of(lm: HookedLM) -> list[str]:
    layer = lm.decoder.layers[0]
    missing = {"resid_mid"} if layer.parallel else set()
    missing |= {"mlp.pre", "mlp.up", "mlp.act"} if layer.pre is None else set()
    missing |= {"mlp.up"} if layer.up is None else set()
    return [point for point in POINTS if point not in missing]


def logits_of(lm: HookedLM, tokens: Tensor, *args: object, **options: object) -> Tensor:
    logits = lm.forward(tokens, *args, **options).logits
    assert logits is not None
    return logits


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_logits_are_transformers_own(name: str) -> None:
    model, tokens = make(name), prompts()
    expected = model(tokens).logits
    lm = HookedLM(model)
    plain = logits_of(lm, tokens)
    assert (plain - expected).abs().max() < 1e-4
    # Looked at from everywhere, attention is explicit and results are by head.
    watched = lm.forward(tokens, cache=points_of(lm))
    assert (watched.logits - expected).abs().max() < 1e-4
    assert plain.std() > 0.1  # the test could fail


@pytest.mark.parametrize("name", EVERY)
def test_replacing_an_activation_by_itself_changes_nothing(name: str) -> None:
    lm, tokens = hooked(name), prompts()
    expected = logits_of(lm, tokens)
    for point in points_of(lm):
        layers = [None] if point in WITHOUT_LAYER else range(lm.num_layers)
        hooks = [Hook(point, layer, lambda x: x.clone()) for layer in layers]
        torch.testing.assert_close(logits_of(lm, tokens, hooks), expected, msg=f"{name} {point}")
        seen = [Hook(point, layer, lambda _: None) for layer in layers]
        torch.testing.assert_close(logits_of(lm, tokens, seen), expected, msg=f"{name} {point}")


@pytest.mark.parametrize("name", EVERY)
def test_activations_fit_together_as_their_names_say(name: str) -> None:
    lm, tokens = hooked(name), prompts()
    points = points_of(lm)
    output = lm.forward(tokens, cache=points)
    kept = output.kept
    for point in points:
        if point not in WITHOUT_LAYER:
            assert kept.stack(point).shape[:2] == (3, 2)
    for layer in range(3):
        z, result = kept["attn.z", layer], kept["attn.result", layer]
        pattern, scores = kept["attn.pattern", layer], kept["attn.scores", layer]
        assert pattern.shape == (2, 4, 10, 10)
        torch.testing.assert_close(pattern.sum(-1), torch.ones(2, 4, 10))
        torch.testing.assert_close(pattern, scores.softmax(-1))
        v = kept["attn.v", layer].repeat_interleave(lm.num_heads // lm.num_key_value_heads, dim=2)
        torch.testing.assert_close(z, torch.einsum("bhts,bshk->bthk", pattern, v))
        torch.testing.assert_close(result, torch.einsum("bthk,hkd->bthd", z, lm.weight("W_O", layer)))
        out = kept["attn.out", layer]
        torch.testing.assert_close(out, result.sum(2) + lm.weight("b_O", layer))
        entered, left = kept["resid_pre", layer], kept["resid_post", layer]
        torch.testing.assert_close(left, entered + out + kept["mlp.out", layer])
        if "resid_mid" in points:
            torch.testing.assert_close(kept["resid_mid", layer], entered + out)
        if layer:
            assert torch.equal(entered, kept["resid_post", layer - 1])
        # Queries before their rotation are linear in what attention reads.
        if name != "olmoe":  # which normalizes them
            q = torch.einsum("btd,hdk->bthk", kept["attn.in", layer], lm.weight("W_Q", layer))
            torch.testing.assert_close(kept["attn.q", layer], q + lm.weight("b_Q", layer))
        if "mlp.act" in points:
            pre = kept["mlp.in", layer] @ lm.weight("W_pre", layer) + lm.weight("b_pre", layer)
            torch.testing.assert_close(kept["mlp.pre", layer], pre)
            down = kept["mlp.act", layer] @ lm.weight("W_down", layer) + lm.weight("b_down", layer)
            torch.testing.assert_close(kept["mlp.out", layer], down)
    last = kept["resid_post", 2]
    last = last - last.mean(-1, keepdim=True) if isinstance(lm.decoder.final_norm, torch.nn.LayerNorm) else last
    normed = last / kept["final_norm.scale"] * lm.weight("g_final") + lm.weight("b_final")
    torch.testing.assert_close(normed @ lm.weight("W_U") + lm.weight("b_U"), output.logits)


@pytest.mark.parametrize("name", EVERY)
def test_zeroing_a_head_subtracts_its_result(name: str) -> None:
    lm, tokens = hooked(name), prompts()
    zero = lm.forward(tokens, mask_heads([(1, 2)], "zero"), cache=["attn.out"]).kept["attn.out", 1]
    plain = lm.forward(tokens, cache=["attn.out", "attn.result"]).kept
    torch.testing.assert_close(zero, plain["attn.out", 1] - plain["attn.result", 1][:, :, 2])
    removed = Hook("attn.result", 1, torch.zeros_like, heads=[2])
    torch.testing.assert_close(logits_of(lm, tokens, [removed]), logits_of(lm, tokens, mask_heads([(1, 2)], "zero")))
    assert not torch.allclose(logits_of(lm, tokens, [removed]), logits_of(lm, tokens))


@pytest.mark.parametrize("name", ["llama", "mistral", "house"])
def test_a_uniform_head_averages_what_it_sees(name: str) -> None:
    lm, tokens = hooked(name), prompts()
    kept = lm.forward(tokens, mask_heads([(0, 3)]), cache=["attn.z", "attn.v", "attn.pattern"]).kept
    window = lm.decoder.layers[0].window or 10
    group = 3 * lm.num_key_value_heads // lm.num_heads
    for t in range(10):
        seen = kept["attn.v", 0][:, max(0, t + 1 - window) : t + 1, group]
        torch.testing.assert_close(kept["attn.z", 0][:, t, 3], seen.mean(1))
    # The same in the fused kernel.
    torch.testing.assert_close(
        lm.forward(tokens, mask_heads([(0, 3)]), cache=["attn.z"]).kept["attn.z", 0], kept["attn.z", 0]
    )


def test_a_mean_head_gives_its_mean_everywhere() -> None:
    lm, tokens = hooked("gpt2"), prompts()
    means = mean_head_output(lm, [prompts(3, 7), prompts(1, 9)])
    plain = [lm.forward(t, cache=["attn.z"]).kept.stack("attn.z") for t in (prompts(3, 7), prompts(1, 9))]
    torch.testing.assert_close(means, (plain[0].sum((1, 2)) + plain[1].sum((1, 2))) / 30)
    kept = lm.forward(tokens, mask_heads([(0, 1), (0, 2), (2, 0)], "mean", means), cache=["attn.z"]).kept
    torch.testing.assert_close(kept["attn.z", 0][:, :, 1:3], means[0, 1:3].expand(2, 10, 2, 8))
    torch.testing.assert_close(kept["attn.z", 2][:, :, 0], means[2, 0].expand(2, 10, 8))


def test_hooks_reach_exactly_the_chosen_part() -> None:
    lm, tokens = hooked("llama"), prompts()
    plain = lm.forward(tokens, cache=["mlp.act", "attn.z", "attn.pattern"]).kept

    def changed(hook: Hook) -> Tensor:
        edited = lm.forward(tokens, [hook], cache=[(hook.point, 0)]).kept[hook.point, 0]
        return (edited - plain[hook.point, 0]).abs() > 1e-3

    expected = torch.zeros(2, 10, 48, dtype=torch.bool)
    expected[:, [3, 9]] = torch.isin(torch.arange(48), torch.tensor([5, 7]))
    assert torch.equal(changed(Hook("mlp.act", 0, lambda x: x + 1, positions=[3, -1], neurons=[5, 7])), expected)

    expected = torch.zeros(2, 10, 4, 8, dtype=torch.bool)
    expected[0, 4, 1] = expected[1, 8, 1] = True  # another position in each sequence
    where = torch.tensor([[4], [-2]])
    assert torch.equal(changed(Hook("attn.z", 0, lambda x: x + 1, positions=where, heads=1)), expected)
    kept = lm.forward(tokens, cache=[("attn.z", 0)], cache_positions=where).kept["attn.z", 0]
    torch.testing.assert_close(kept, torch.stack([plain["attn.z", 0][0, [4]], plain["attn.z", 0][1, [8]]]))

    def half_on_the_first_two(row: Tensor) -> Tensor:
        assert row.shape == (2, 1, 1, 10)
        new = torch.zeros_like(row)
        new[..., :2] = 0.5
        return new

    hook = Hook("attn.pattern", 0, half_on_the_first_two, positions=[-1], heads=[2])
    kept = lm.forward(tokens, [hook], cache=["attn.z", "attn.v"]).kept
    torch.testing.assert_close(kept["attn.z", 0][:, -1, 2], kept["attn.v", 0][:, :2, 1].mean(1))
    torch.testing.assert_close(kept["attn.z", 0][:, :-1], plain["attn.z", 0][:, :-1])


def test_hooks_of_a_point_run_in_order_and_the_kept_activation_is_what_they_leave() -> None:
    lm, tokens = hooked("house"), prompts()
    hooks = [Hook("resid_post", 1, lambda _: 2.0), Hook("resid_post", 1, lambda x: x * 3)]
    kept = lm.forward(tokens, hooks, cache=["resid_post", "resid_pre"]).kept
    assert torch.equal(kept["resid_post", 1], torch.full((2, 10, 32), 6.0))
    assert torch.equal(kept["resid_pre", 2], kept["resid_post", 1])


def test_no_hook_on_scores_can_look_into_the_future() -> None:
    lm, tokens = hooked("gpt2"), prompts()
    hook = Hook("attn.scores", 0, torch.zeros_like)
    pattern = lm.forward(tokens, [hook], cache=["attn.pattern"]).kept["attn.pattern", 0]
    expected = torch.tril(torch.ones(10, 10)) / torch.arange(1, 11)[:, None]
    torch.testing.assert_close(pattern, expected.expand(2, 4, 10, 10))


def test_gradients_flow_to_what_a_hook_puts_in() -> None:
    lm, tokens = hooked("llama"), prompts()
    gates = torch.ones(4, 1, requires_grad=True)
    logits = logits_of(lm, tokens, [Hook("attn.z", 1, lambda z: z * gates)])
    logits[:, -1, 3].sum().backward()
    step = 1e-2
    for head in range(4):
        moved = [
            logits_of(lm, tokens, [Hook("attn.z", 1, lambda z, s=s: z * (1 + s), heads=[head])])[:, -1, 3].sum()
            for s in (step, -step)
        ]
        assert gates.grad[head].item() == pytest.approx(((moved[0] - moved[1]) / (2 * step)).item(), abs=2e-3)


@pytest.mark.parametrize("name", EVERY)
def test_generation_with_the_cache_is_that_without(name: str) -> None:
    lm, tokens = hooked(name), prompts(2, 8)
    made = lm.generate(tokens, 6, attention="rows")
    longer = tokens
    for step in range(6):
        output = lm.forward(longer, cache=["attn.pattern"])
        rows = output.kept.stack("attn.pattern")[:, :, :, -1].transpose(0, 1)
        torch.testing.assert_close(made.attention_rows[step], rows)
        longer = torch.cat([longer, output.logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(made.tokens, longer[:, 8:])
    argmax = lm.generate(tokens, 6, attention="argmax").attention_argmax
    assert torch.equal(argmax, torch.stack([rows.argmax(-1) for rows in made.attention_rows], dim=1))
    assert argmax.shape == (2, 6, 3, 4)


def test_one_prefill_serves_many_continuations() -> None:
    lm, tokens = hooked("llama"), prompts(1, 12)
    past = lm.prefill(tokens[:, :-1])
    plain = lm.generate(tokens, 5).tokens
    masked = lm.generate(tokens, 5, hooks=mask_heads([(layer, 0) for layer in range(3)], "zero")).tokens
    for _ in range(2):
        assert torch.equal(lm.generate(tokens, 5, past=past).tokens, plain)
        hooks = mask_heads([(layer, 0) for layer in range(3)], "zero")
        assert torch.equal(lm.generate(tokens, 5, past=past, hooks=hooks).tokens, masked)
    assert past.length == 11
    # Long enough for the cache to grow, and several tokens at once behind a prefix.
    assert lm.generate(tokens, 50, past=past).tokens.shape == (1, 50)
    more = prompts(1, 4)
    joined = logits_of(lm, torch.cat([tokens[:, :-1], more], dim=1))[:, 11:]
    torch.testing.assert_close(logits_of(lm, more, past=past), joined)


def test_masks_can_hold_for_decoding_alone_and_for_the_prefill() -> None:
    lm, tokens = hooked("house"), prompts(1, 9)
    hooks = mask_heads([(layer, head) for layer in range(3) for head in range(4)], "zero")
    every = lm.generate(tokens, 1, hooks=hooks, prefill_hooks=hooks).tokens
    assert torch.equal(every[:, 0], logits_of(lm, tokens, hooks)[:, -1].argmax(-1))
    last = [Hook(hook.point, hook.layer, hook.function, positions=[-1], heads=hook.heads) for hook in hooks]
    decoding = lm.generate(tokens, 1, hooks=hooks).tokens
    assert torch.equal(decoding[:, 0], logits_of(lm, tokens, last)[:, -1].argmax(-1))


def test_a_sequence_stops_at_a_stop_token_and_generation_when_all_have() -> None:
    lm, tokens = hooked("house"), prompts(3, 6)
    free = lm.generate(tokens, 8).tokens
    stop = int(free[0, 1])
    made = lm.generate(tokens, 8, stop=[stop]).tokens
    for row, full in zip(made.tolist(), free.tolist(), strict=True):
        end = full.index(stop) + 1 if stop in full else len(full)
        assert row[:end] == full[:end][: len(row)]
        assert set(row[end:]) <= {stop}
    assert lm.generate(tokens[:1], 8, stop=[stop]).tokens.shape[1] <= 2


def test_sampling_follows_the_seed_and_the_distribution() -> None:
    lm, tokens = hooked("house"), prompts(1, 5)
    first = lm.generate(tokens, 12, temperature=2.0, generator=torch.Generator().manual_seed(1)).tokens
    again = lm.generate(tokens, 12, temperature=2.0, generator=torch.Generator().manual_seed(1)).tokens
    other = lm.generate(tokens, 12, temperature=2.0, generator=torch.Generator().manual_seed(2)).tokens
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    many = tokens.expand(4000, 5)
    drawn = lm.generate(many, 1, temperature=0.7, generator=torch.Generator().manual_seed(0)).tokens[:, 0]
    expected = (logits_of(lm, tokens)[0, -1] / 0.7).softmax(-1)
    share = torch.bincount(drawn, minlength=50) / 4000
    assert (share - expected).abs().max() < 4 * math.sqrt(0.25 / 4000)


@pytest.mark.parametrize("name", EVERY)
def test_paths_execute_the_layers_they_name(name: str) -> None:
    lm, tokens = hooked(name), prompts()
    plain = logits_of(lm, tokens)
    torch.testing.assert_close(logits_of(lm, tokens, path=[0, 1, 2]), plain)
    repeated = lm.forward(tokens, path=[0, 1, 1, 2], cache=["resid_pre", "resid_post"])
    assert [repeated.kept["resid_pre", index].shape for index in range(4)]
    made = lm.generate(tokens, 4, path=[0, 1, 1, 2]).tokens
    longer = tokens
    for _ in range(4):
        longer = torch.cat([longer, logits_of(lm, longer, path=[0, 1, 1, 2])[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(made, longer[:, 10:])
    # Skipping a layer is a model that has lost it; repeating one, a model that has it twice.
    layers = lm.decoder.layers
    lm.decoder.layers = [layers[0], layers[1], layers[1], layers[2]]
    lm.num_layers = 4
    torch.testing.assert_close(logits_of(lm, tokens), repeated.logits)
    lm.decoder.layers, lm.num_layers = [layers[0], layers[2]], 2
    without = logits_of(lm, tokens)
    lm.decoder.layers, lm.num_layers = layers, 3
    torch.testing.assert_close(logits_of(lm, tokens, path=[0, 2]), without)
    assert not torch.allclose(without, plain)


@pytest.mark.parametrize("name", EVERY)
def test_folding_the_norms_keeps_the_logits_and_empties_the_norms(name: str) -> None:
    lm, tokens = hooked(name), prompts()
    plain = logits_of(lm, tokens)
    assert lm.fold_norm() is lm
    torch.testing.assert_close(logits_of(lm, tokens), plain, atol=1e-4, rtol=1e-4)
    for role in ("g_attn", "g_mlp", "g_final"):
        assert (lm.weight(role) == 1).all()
    for role in ("b_attn", "b_mlp", "b_final"):
        assert (lm.weight(role) == 0).all()
    torch.testing.assert_close(logits_of(lm.fold_norm(), tokens), plain, atol=1e-4, rtol=1e-4)  # once is enough
    if name in TRANSFORMERS:
        torch.testing.assert_close(lm.model(tokens).logits, logits_of(lm, tokens))


@pytest.mark.parametrize("name", EVERY)
def test_centering_keeps_the_log_probabilities(name: str) -> None:
    lm, tokens = hooked(name), prompts()
    plain = logits_of(lm, tokens).log_softmax(-1)
    output = lm.center().forward(tokens, cache=["resid_post"])
    torch.testing.assert_close(output.logits.log_softmax(-1), plain, atol=1e-4, rtol=1e-4)
    assert lm.weight("W_U").mean(1).abs().max() < 1e-6
    centered = output.kept.stack("resid_post").mean(-1).abs().max() < 1e-5
    assert centered == (name in ("gpt2", "gpt_neox", "gpt_neox_serial", "opt", "house_gpt2_like"))


def test_gpt_neox_interleaves_queries_keys_and_values_by_head() -> None:
    lm = hooked("gpt_neox")
    fused = lm.decoder.layers[1].query.module.weight  # head 0: q k v, head 1: q k v …
    assert torch.equal(lm.weight("W_K", 1, 2), fused[2 * 24 + 8 : 2 * 24 + 16].T)
    assert torch.equal(lm.weight("W_V", 1, 0), fused[16:24].T)


def test_weights_by_role_are_views_with_documented_shapes() -> None:
    lm = hooked("llama")
    shapes = {role: tuple(lm.weight(role, 0).shape) for role in ("W_Q", "W_K", "W_V", "W_O", "b_Q", "W_up", "W_down")}
    assert shapes == {
        "W_Q": (4, 32, 8),
        "W_K": (2, 32, 8),
        "W_V": (2, 32, 8),
        "W_O": (4, 8, 32),
        "b_Q": (4, 8),
        "W_up": (32, 48),
        "W_down": (48, 32),
    }
    assert lm.weight("W_Q").shape == (3, 4, 32, 8)
    assert lm.weight("W_E").shape == (50, 32)
    assert lm.weight("W_U").shape == (32, 50)
    lm.weight("W_O", 1, 3).zero_()
    kept = lm.forward(prompts(), cache=["attn.result"]).kept["attn.result", 1]
    assert (kept[:, :, 3] == 0).all()
    assert (kept[:, :, 2] != 0).any()


def test_mistakes_are_named() -> None:
    lm, tokens = hooked("llama"), prompts()
    none = lambda x: x  # noqa: E731
    with pytest.raises(UserError, match=r"no hook point 'attn\.zz': choose one of resid_pre"):
        Hook("attn.zz", 0, none)
    with pytest.raises(UserError, match=r"mlp\.act has no heads"):
        Hook("mlp.act", 0, none, heads=[1])
    with pytest.raises(UserError, match=r"attn\.z has no neurons"):
        Hook("attn.z", 0, none, neurons=[1])
    with pytest.raises(UserError, match=r"attn\.z of layer 3: this run has the layers 0 to 2"):
        lm.forward(tokens, [Hook("attn.z", 3, none)])
    with pytest.raises(UserError, match="layer 2: this run has the layers 0 to 1"):
        lm.forward(tokens, [Hook("attn.z", 2, none)], path=[0, 2])
    with pytest.raises(UserError, match="logits belongs to the whole model"):
        lm.forward(tokens, cache=[("logits", 1)])
    with pytest.raises(UserError, match="4 heads; chosen"):
        lm.forward(tokens, [Hook("attn.z", 0, none, heads=[4])])
    with pytest.raises(UserError, match="2 key-value-heads; chosen"):
        lm.forward(tokens, [Hook("attn.k", 0, none, heads=[2])])
    with pytest.raises(UserError, match="10 positions; chosen"):
        lm.forward(tokens, [Hook("attn.z", 0, none, positions=10)])
    with pytest.raises(UserError, match="a row for each of the 2 sequences"):
        lm.forward(tokens, [Hook("attn.z", 0, none, positions=torch.zeros(3, 1))])
    with pytest.raises(UserError, match=r"attn\.z of layer 0 was not kept"):
        lm.forward(tokens, cache=["attn.q"]).kept["attn.z", 0]
    with pytest.raises(UserError, match="the path names \\[7\\]"):
        lm.forward(tokens, path=[0, 7])
    with pytest.raises(UserError, match="65 tokens long and the model has 64 positions"):
        lm.forward(prompts(1, 65))
    with pytest.raises(UserError, match="66 tokens long"):
        lm.generate(prompts(1, 60), 7)
    with pytest.raises(UserError, match="token ids run from 0 to 49"):
        lm.forward(torch.tensor([[50]]))
    with pytest.raises(UserError, match="reads token ids"):
        lm.forward(torch.zeros(1, 3))
    with pytest.raises(UserError, match="must hold the 9 tokens before the last"):
        lm.generate(tokens, 2, past=lm.prefill(tokens[:, :5]))
    with pytest.raises(UserError, match="another path"):
        lm.generate(tokens, 2, past=lm.prefill(tokens[:, :9]), path=[0, 1])
    with pytest.raises(UserError, match="choose uniform, zero or mean"):
        mask_heads([(0, 0)], "median")
    with pytest.raises(UserError, match="needs `means`"):
        mask_heads([(0, 0)], "mean")
    with pytest.raises(UserError, match="attention can be"):
        lm.generate(tokens, 1, attention="all")
    with pytest.raises(UserError, match="no weight 'W_X'"):
        lm.weight("W_X", 0)
    with pytest.raises(UserError, match="has no W_pos"):
        lm.weight("W_pos")
    with pytest.raises(UserError, match="layers 0 to 2"):
        lm.weight("W_Q", 3)
    with pytest.raises(UserError, match="heads 0 to 1"):
        lm.weight("W_K", 0, 2)
    with pytest.raises(UserError, match="has no tokenizer"):
        lm.encode("a")


def test_points_that_a_family_lacks_are_named() -> None:
    with pytest.raises(UserError, match="one node of experts"):
        hooked("mixtral").forward(prompts(), cache=["mlp.act"])
    with pytest.raises(UserError, match=r"no mlp\.up"):
        hooked("gpt2").forward(prompts(), cache=["mlp.up"])
    with pytest.raises(UserError, match="no resid_mid"):
        hooked("gpt_neox").forward(prompts(), cache=["resid_mid"])
    with pytest.raises(UserError, match="this model has no W_up"):
        hooked("gpt2").weight("W_up", 0)
