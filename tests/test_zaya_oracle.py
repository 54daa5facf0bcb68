"""ZAYA1 agrees with transformers: logits, gradients, generation, files, with the skip expert as transformers has it
and, transformers corrected, as the released weights were trained. The convolution agrees with its formula."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import (
    NEW_TOKENS,
    ZAYA,
    assert_gradients_agree,
    greedy,
    greedy_with_kvell,
    greedy_without_cache,
    logits_without_cache,
    loss_of,
    our_zaya_names,
    prompt,
    write,
    zaya,
    zaya_choices,
    zaya_tensors,
)
from shape_checks import unchecked
from torch import Tensor, nn
from transformers import ZayaForCausalLM
from transformers.models.zaya.modeling_zaya import ZayaSparseMoeBlock

import kvell
from kvell.layers import key_values
from kvell.layers.convolutional import Convolutional, ConvolutionalAttention
from kvell.layers.part import Site
from kvell.step import Step

HYBRID, SLIDING = "hybrid", "hybrid_sliding"
# The first tokens, where the convolution looks across the beginning; around the windows of 5 and of 128; long.
LENGTHS = [1, 3, 4, 5, 7, 127, 128, 129, 131, 515]


def rope(hybrid: float | None, sliding: float | None) -> dict[str, Any]:
    """Rotary settings that turn these fractions of a head; None leaves the fraction unsaid, which means all of it."""
    fractions = {HYBRID: hybrid, SLIDING: sliding}
    thetas = {HYBRID: 5e6, SLIDING: 1e4}
    return {
        name: {"rope_type": "default", "rope_theta": thetas[name]}
        | ({} if fraction is None else {"partial_rotary_factor": fraction})
        for name, fraction in fractions.items()
    }


CASES: dict[str, dict[str, Any]] = {
    "like ZAYA1-8B: four query heads to a KV head, released thetas": {
        "num_attention_heads": 8,
        "rope_parameters": rope(0.5, 0.5),
    },
    "like the 74B: sliding and full layers in turn, a window of 5": {
        "layer_types": [SLIDING, HYBRID] * 2,
        "sliding_window": 5,
    },
    "a window of 1, an untied head": {
        "layer_types": [SLIDING, HYBRID, SLIDING, SLIDING],
        "sliding_window": 1,
        "tie_word_embeddings": False,
    },
    "sliding layers only, a window of 2, one KV head": {
        "layer_types": [SLIDING] * 4,
        "sliding_window": 2,
        "num_key_value_heads": 1,
    },
    "a window of 128, all channels turned, biases": {
        "layer_types": [HYBRID, SLIDING, SLIDING, SLIDING],
        "sliding_window": 128,
        "rope_parameters": rope(1.0, 1.0),
        "attention_bias": True,
    },
    "a window longer than everything, the fraction turned left unsaid": {
        "layer_types": [SLIDING, HYBRID, SLIDING, HYBRID],
        "sliding_window": 700,
        "rope_parameters": rope(None, 0.25),
    },
    "a KV head for each of four query heads, kernels of 3 and 4": {
        "num_key_value_heads": 4,
        "cca_time0": 3,
        "cca_time1": 4,
    },
    "one KV head for six query heads, kernels of 1 and 2, biases, an untied head": {
        "num_attention_heads": 6,
        "num_key_value_heads": 1,
        "cca_time0": 1,
        "attention_bias": True,
        "tie_word_embeddings": False,
    },
    "three KV heads: the middle one is half current and half delayed; kernels of 4 and 1": {
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "cca_time0": 4,
        "cca_time1": 1,
        "layer_types": [HYBRID, SLIDING, HYBRID, SLIDING],
        "sliding_window": 6,
        "rope_parameters": rope(0.5, 1.0),
    },
    "kernels of 1 only, which look back on nothing": {
        "cca_time0": 1,
        "cca_time1": 1,
    },
    "seven experts, a narrow router, a large eps, another activation": {
        "num_experts": 7,
        "router_hidden_size": 5,
        "moe_intermediate_size": 20,
        "rms_norm_eps": 1e-2,
        "hidden_act": "gelu_pytorch_tanh",
    },
    "one layer, two experts, a wide router": {
        "num_hidden_layers": 1,
        "layer_types": [HYBRID],
        "num_experts": 2,
        "router_hidden_size": 40,
        "head_dim": 16,
    },
}
RELEASED, IN_TURN, WINDOW_1, WINDOW_2, BIASED, LONG, KERNELS, ONE_KV, THREE_KV, NO_REACH, SEVEN, SINGLE = CASES
each_case = pytest.mark.parametrize("case", CASES)
Load = Callable[..., kvell.Decoder]


def released_config(case: str) -> dict[str, Any]:
    return ZAYA | CASES[case]


@cache
def reference(case: str) -> ZayaForCausalLM:
    return zaya(released_config(case), seed=2)


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Load:
    """Kvell's model of a case's files, which no test may change.

    `skip` None leaves skip_expert unsaid, as all released files do; by default it is what transformers has.
    """

    @cache
    def load(case: str, skip: str | None = "zero") -> kvell.Decoder:
        config = released_config(case) | {"skip_expert": skip}
        if skip is None:
            del config["skip_expert"]
        return kvell.from_pretrained(write(tmp_path_factory.mktemp("zaya"), config, zaya_tensors(reference(case))))

    return load


@torch.no_grad()
def assert_same_logits(model: kvell.Decoder, case: str, length: int = 24) -> None:
    tokens = prompt(length)
    with zaya_choices(reference(case)):
        wanted = logits_without_cache(reference(case), tokens)
    assert 1 < wanted.abs().max() < 15
    with unchecked():
        torch.testing.assert_close(model(tokens), wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("length", LENGTHS)
@each_case
def test_logits_equal_those_of_transformers(case: str, length: int, load: Load) -> None:
    assert_same_logits(load(case), case, length)


@each_case
@torch.no_grad()
def test_in_every_case_some_tokens_skip_and_others_do_not(case: str) -> None:
    """What the other tests compare contains the skip expert's choice, and the experts'."""
    with zaya_choices(reference(case)) as chosen:
        logits_without_cache(reference(case), prompt(515))
    skips = torch.cat([torch.cat(parts) for parts in chosen.values()]) == released_config(case)["num_experts"]
    assert 20 <= skips.sum() <= 0.9 * len(skips)
    assert all(layer.self_attn.qk_norm.temp.abs().min() > 0.1 for layer in reference(case).model.layers)


@pytest.mark.parametrize(("case", "length"), list(zip(CASES, [1, 2, 3, 24] * 3, strict=True)))
def test_64_greedy_tokens_equal_those_of_transformers(case: str, length: int, load: Load) -> None:
    # With a window of 1 transformers' cache keeps everything instead of nothing; without a cache it is right.
    theirs = greedy_without_cache if case == WINDOW_1 else greedy
    with zaya_choices(reference(case)):
        tokens, logits = theirs(reference(case), prompt(length))
    our_tokens, our_logits = greedy_with_kvell(load(case), prompt(length))
    assert len(tokens) == NEW_TOKENS
    assert our_tokens == tokens
    torch.testing.assert_close(our_logits, logits, rtol=0, atol=1e-4)


@each_case
@torch.no_grad()
def test_what_kvell_saves_transformers_loads(case: str, load: Load, tmp_path: Path) -> None:
    load(case).save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert saved["model_type"] == "zaya", "saved in Kvell's own format"
    assert saved["skip_expert"] == "zero"
    # transformers 5.23 writes -1 into the last balancing bias after loading, whatever the file says. The reference
    # has -1 there for this reason.
    again, report = ZayaForCausalLM.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    wanted = logits_without_cache(reference(case), prompt(40))
    torch.testing.assert_close(logits_without_cache(again.eval(), prompt(40)), wanted, rtol=0, atol=1e-5)


@each_case
def test_what_transformers_saves_kvell_loads(case: str, tmp_path: Path) -> None:
    reference(case).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(saved | {"skip_expert": "zero"}))
    assert_same_logits(kvell.from_pretrained(tmp_path), case)


def assert_same_gradients(model: kvell.Decoder, theirs: ZayaForCausalLM) -> None:
    """Of all parameters, with and without activation checkpointing."""
    tokens = prompt(60)
    theirs.zero_grad()
    with zaya_choices(theirs):
        loss_of(logits_without_cache(theirs, tokens), tokens).backward()
    model.zero_grad()
    names = our_zaya_names(theirs)
    assert set(names) == {name for name, _ in model.named_tensors()}
    learnt = {ours: name for ours, name in names.items() if not name.endswith("balancing_biases")}
    loss_of(model(tokens), tokens).backward()
    assert_gradients_agree(model, theirs, learnt)
    checkpointed = kvell.Decoder(model.config, activation_checkpointing=True)
    checkpointed.load_state_dict(model.state_dict())
    loss_of(checkpointed(tokens), tokens).backward()
    assert_gradients_agree(checkpointed, theirs, learnt)


# A layer with a window of 1 has no choice what to attend to: its queries and keys have no gradient.
@pytest.mark.parametrize("case", [case for case in CASES if case != WINDOW_1])
def test_gradients_equal_those_of_transformers(case: str, load: Load) -> None:
    assert_same_gradients(load(case), reference(case))


@pytest.fixture
def skipping_is_the_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers with the skip expert as the released weights were trained: probability times the block's input.

    The router is computed here once more, as transformers' own hides the class it chose.
    """
    forward = ZayaSparseMoeBlock.forward

    def with_identity(block: nn.Module, x: Tensor, states: Tensor | None = None) -> tuple[Tensor, Tensor]:
        output, next_states = forward(block, x, states)
        gate = block.gate
        state = gate.down_proj(x)
        if gate.layer_idx > 0:
            state = state + states * gate.router_states_scale
        probabilities = gate.router_mlp(state).softmax(-1)
        skips = (probabilities + gate.balancing_biases).argmax(-1) == gate.num_experts
        return output + x * (probabilities[..., -1] * skips)[..., None], next_states

    monkeypatch.setattr(ZayaSparseMoeBlock, "forward", with_identity)


@pytest.mark.usefixtures("skipping_is_the_identity")
class TestSkippingAsTheReleasedWeightsWereTrained:
    """A config.json that does not name the skip expert, as no released one does, means the identity."""

    @pytest.mark.parametrize("length", [1, 7, 131])
    @each_case
    def test_logits_equal_those_of_transformers_corrected(self, case: str, length: int, load: Load) -> None:
        assert_same_logits(load(case, None), case, length)

    @pytest.mark.parametrize("case", [IN_TURN])
    def test_64_greedy_tokens_equal_those_of_transformers_corrected(self, case: str, load: Load) -> None:
        with zaya_choices(reference(case)):
            tokens, logits = greedy(reference(case), prompt(24))
        our_tokens, our_logits = greedy_with_kvell(load(case, None), prompt(24))
        assert our_tokens == tokens
        torch.testing.assert_close(our_logits, logits, rtol=0, atol=1e-4)

    @pytest.mark.parametrize("case", [RELEASED, BIASED, SEVEN])
    def test_gradients_equal_those_of_transformers_corrected(self, case: str, load: Load) -> None:
        assert_same_gradients(load(case, None), reference(case))

    def test_a_saved_model_says_nothing_of_it(self, load: Load, tmp_path: Path) -> None:
        """A field that no released file has would be an unknown one to other readers."""
        load(RELEASED, None).save_pretrained(tmp_path / "saved")
        assert "skip_expert" not in json.loads((tmp_path / "saved" / "config.json").read_text())
        assert_same_logits(kvell.from_pretrained(tmp_path / "saved"), RELEASED)


@each_case
@torch.no_grad()
def test_the_two_skip_experts_differ(case: str, load: Load) -> None:
    tokens = prompt(515)
    zero, identity = load(case)(tokens), load(case, "identity")(tokens)
    assert (zero - identity).abs().max() > 0.1


@torch.no_grad()
def test_the_balancing_bias_chooses_a_class_and_does_not_weigh_it(tmp_path: Path) -> None:
    folder = write(tmp_path, released_config(RELEASED), zaya_tensors(reference(RELEASED)))
    router = kvell.from_pretrained(folder).layers[0].feed_forward.router
    x, step = torch.randn(50, 64), Step.of(torch.zeros(50, dtype=torch.long), [50], None)
    logits = router.out_proj(
        nn.functional.gelu(router.fc2(nn.functional.gelu(router.fc1(router.norm(router.down_proj(x))))))
    )
    probabilities = logits.softmax(-1)
    for favoured in range(5):
        router.selection_bias.copy_(torch.eye(5)[favoured] * 9)
        weights, chosen = router(x, step)
        assert chosen.unique().tolist() == [favoured]
        torch.testing.assert_close(weights, probabilities[:, favoured : favoured + 1])


@torch.no_grad()
def test_a_bfloat16_model_chooses_experts_and_adds_up_the_residual_in_fp32(tmp_path: Path) -> None:
    """Near-ties in bf16 would turn choices: 0.0001 is less than a step of bf16 at a probability of a fifth."""
    folder = write(tmp_path, released_config(RELEASED), zaya_tensors(reference(RELEASED)))
    model = kvell.from_pretrained(folder, dtype=torch.bfloat16)
    _, streams = model(prompt(), return_streams=True)
    assert streams.dtype == torch.float32
    router = model.layers[0].feed_forward.router
    theirs = reference(RELEASED).model.layers[0].mlp.gate.balancing_biases
    assert router.selection_bias.dtype == torch.float32
    assert torch.equal(router.selection_bias, theirs)
    router.out_proj.weight.zero_()
    step = Step.of(torch.zeros(9, dtype=torch.long), [9], None)
    for favoured in range(5):
        router.selection_bias.copy_(torch.eye(5)[favoured] * 1e-4)
        assert router(torch.randn(9, 64).bfloat16(), step)[1].unique().tolist() == [favoured]


def convolved(x: Tensor, layer: ConvolutionalAttention, before: float | None) -> tuple[Tensor, Tensor]:
    """Queries (T, H, D) and keys (T, K, D), number by number from the formula, without rotation.

    Before the sequence, zeros stand before the first convolution, which makes its bias of them; `before` is what
    would stand before the second one instead.
    """
    config = layer.config
    heads, kv_heads, width = config.num_heads, config.num_kv_heads, config.head_dim
    group = heads // kv_heads
    rows = torch.cat([x @ layer.q_proj.weight.T, x @ layer.k_proj.weight.T], dim=1).view(-1, heads + kv_heads, width)
    first, second = layer.conv_depthwise, layer.conv_grouped
    # By head: (heads, D, taps) and (heads, D out, D in, taps), the last tap being the token's own.
    first_taps, second_taps = (
        conv.weight.view(heads + kv_heads, width, *conv.weight.shape[1:]) for conv in (first, second)
    )
    first_taps = first_taps[:, :, 0]

    def after_first(t: int) -> Tensor:
        if t < 0 and before is not None:
            return torch.full((heads + kv_heads, width), before)
        y = first.bias.view(heads + kv_heads, width).clone()
        for back in range(config.depthwise_kernel):
            if t - back >= 0:
                y += first_taps[:, :, -1 - back] * rows[t - back]
        return y

    def after_second(t: int) -> Tensor:
        y = second.bias.view(heads + kv_heads, width).clone()
        for back in range(config.grouped_kernel):
            for head in range(heads + kv_heads):
                y[head] += second_taps[head, :, :, -1 - back] @ after_first(t - back)[head]
        return y

    queries, keys = [], []
    for t in range(len(x)):
        means = [(rows[t, head] + rows[t, heads + head // group]) / 2 for head in range(heads)]
        key_means = [sum(means[kv * group : (kv + 1) * group]) / group for kv in range(kv_heads)]
        both = after_second(t) + torch.stack(means + key_means)
        both = both / both.pow(2).sum(-1, keepdim=True).sqrt() * width**0.5
        queries.append(both[:heads])
        keys.append(both[heads:] * layer.temperature[:, None])
    return torch.stack(queries), torch.stack(keys)


@pytest.mark.parametrize("counts", [[3], [1, 1, 1], [1, 2], [2, 1]])
@pytest.mark.parametrize("kernels", [(2, 2), (3, 2), (2, 4), (1, 2), (2, 1)])
@torch.no_grad()
def test_the_first_tokens_second_convolution_sees_the_first_ones_bias(
    kernels: tuple[int, int], counts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One left pad stands before both convolutions. Padding each of them shows the second one zeros."""
    config = Convolutional(
        num_heads=4,
        num_kv_heads=2,
        head_dim=6,
        rotary=None,
        depthwise_kernel=kernels[0],
        grouped_kernel=kernels[1],
    )
    layer = config.build(Site(hidden_size=20, vocab_size=9, num_layers=1, norm_eps=1e-5, index=0))
    for parameter in layer.parameters():
        parameter.normal_(0, 0.5)
    seen: list[tuple[Tensor, Tensor]] = []

    def attention(query: Tensor, keys: list[Tensor], *rest: Any, **more: Any) -> Tensor:
        seen.append((query, keys[0][-len(query) :].clone()))
        return query

    monkeypatch.setattr(key_values, "attention", attention)
    x = torch.randn(3, 20)
    cache = kvell.Cache({(0, spec.name): spec for spec in config.streams()})
    for part in x.split(counts):
        layer(part, Step.of(torch.zeros(len(part), dtype=torch.long), [len(part)], cache))
        cache.end_step([len(part)])
    queries, keys = (torch.cat(parts) for parts in zip(*seen, strict=True))
    wanted_queries, wanted_keys = convolved(x, layer, before=None)
    torch.testing.assert_close(queries, wanted_queries, rtol=0, atol=1e-5)
    torch.testing.assert_close(keys, wanted_keys, rtol=0, atol=1e-5)
    with_zeros, _ = convolved(x, layer, before=0.0)
    reached = min(kernels[1] - 1, 3)
    assert ((with_zeros - wanted_queries).abs().amax((1, 2)) > 0.01).tolist() == [t < reached for t in range(3)]
