"""Laguna agrees with transformers: logits, gradients, generation, and files in every spelling that is met."""

import json
import math
from functools import cache
from pathlib import Path

import pytest
import torch
from oracle import (
    FULL,
    LAGUNA,
    NEW_TOKENS,
    PROMPT_LENGTH,
    SLIDING,
    assert_gradients_agree,
    greedy,
    greedy_with_kvell,
    laguna,
    laguna_tensors,
    learnt_names,
    logits_without_cache,
    loss_of,
    prompt,
    write,
    yarn,
)
from shape_checks import unchecked
from torch import Tensor
from transformers import LagunaForCausalLM

import kvell
from kvell.layers.rotary import rotary_table
from kvell.step import Step

XS_21_FACTOR = 1.3465735902799727  # Laguna-XS-2.1's attention_factor

CASES = {
    "like XS.2: YaRN with attention factor 1": {
        "rope_parameters": yarn(attention_factor=1.0),
    },
    "like XS-2.1: YaRN with attention factor 1.35, a window as long as the prompt": {
        "rope_parameters": yarn(attention_factor=XS_21_FACTOR, original_max_position_embeddings=8192),
        "gating": "per-head",
        "sliding_window": PROMPT_LENGTH,
    },
    "YaRN without a stated attention factor, fast and slow bounds by default": {
        "rope_parameters": yarn(factor=16.0, beta_fast=None, beta_slow=None, partial_rotary_factor=1.0),
        "sliding_window": PROMPT_LENGTH + 1,
    },
    "like M.1: full layers only, a gate per element, default rotary settings": {
        "layer_types": None,
        "num_attention_heads_per_layer": None,
        "gating": "per-element",
        "moe_routed_scaling_factor": None,
    },
    "router logits capped, every other layer sparse, a window longer than everything": {
        "rope_parameters": yarn(attention_factor=1.0, factor=64.0),
        "moe_router_logit_softcapping": 0.7,
        "mlp_layer_types": ["sparse", "dense", "sparse", "dense"],
        "sliding_window": 200,
    },
    "all experts chosen, sliding layers first, one KV head": {
        "rope_parameters": yarn(attention_factor=0.8),
        "layer_types": [SLIDING, SLIDING, FULL, SLIDING],
        "num_attention_heads_per_layer": [4, 2, 6, 4],
        "num_key_value_heads": 1,
        "mlp_layer_types": ["sparse"] * 4,
        "num_experts_per_tok": 8,
        "sliding_window": 2,
    },
    "dense only, a tied head": {
        "rope_parameters": yarn(attention_factor=1.0),
        "mlp_layer_types": ["dense"] * 4,
        "tie_word_embeddings": True,
        "sliding_window": 40,
    },
    "sliding layers only, biases, one expert a token, feed-forward types absent": {
        "rope_parameters": yarn(),
        "layer_types": [SLIDING] * 4,
        "attention_bias": True,
        "num_experts_per_tok": 1,
        "mlp_layer_types": None,
        "gating": "per-element",
        "sliding_window": PROMPT_LENGTH - 1,
    },
}
XS2, XS21, UNSTATED, M1, CAPPED, ALL_CHOSEN, DENSE = list(CASES)[:7]
each_case = pytest.mark.parametrize("case", CASES)


def released_config(case: str) -> dict:
    config = {name: value for name, value in (LAGUNA | CASES[case]).items() if value is not None}
    for rope in config.get("rope_parameters", {}).values():
        for name in [name for name, value in rope.items() if value is None]:
            del rope[name]
    return config


@cache
def reference(case: str) -> LagunaForCausalLM:
    return laguna(released_config(case))


@pytest.fixture
def load(tmp_path: Path):
    def load(case: str, **arguments) -> kvell.Decoder:
        folder = write(tmp_path / "released", released_config(case), laguna_tensors(reference(case)))
        return kvell.from_pretrained(folder, **arguments)

    return load


@torch.no_grad()
def assert_same_logits(model: kvell.Decoder, case: str) -> None:
    wanted = logits_without_cache(reference(case), prompt())
    torch.testing.assert_close(model(prompt()), wanted, rtol=0, atol=1e-4)


@each_case
def test_logits_equal_those_of_transformers(case: str, load) -> None:
    assert_same_logits(load(case), case)


@each_case
def test_64_greedy_tokens_equal_those_of_transformers(case: str, load) -> None:
    tokens, logits = greedy(reference(case), prompt())
    our_tokens, our_logits = greedy_with_kvell(load(case), prompt())
    assert our_tokens == tokens
    torch.testing.assert_close(our_logits, logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("case", [XS2, XS21, M1])
def test_generate_says_what_transformers_says_up_to_the_end_token(case: str, load) -> None:
    model = load(case)
    tokens, _ = greedy(reference(case), prompt())
    ends = [index for index, token in enumerate(tokens) if token in (2, 24)]
    wanted = tokens[: ends[0] + 1] if ends else tokens
    with unchecked():
        assert list(kvell.generate(model, prompt()[0], max_new_tokens=NEW_TOKENS)) == wanted


@each_case
@torch.no_grad()
def test_the_cache_changes_nothing_token_by_token(case: str, load) -> None:
    model, tokens = load(case), prompt(2 * PROMPT_LENGTH)
    cache = model.make_cache()
    pieces = [model(tokens[:, :PROMPT_LENGTH], cache=cache)]
    pieces += [model(token, cache=cache) for token in tokens[:, PROMPT_LENGTH:].split(1, dim=1)]
    wanted = logits_without_cache(reference(case), tokens)
    torch.testing.assert_close(torch.cat(pieces, dim=1), wanted, rtol=0, atol=1e-4)
    torch.testing.assert_close(model(tokens), wanted, rtol=0, atol=1e-4)


@each_case
@torch.no_grad()
def test_what_kvell_saves_transformers_loads(case: str, load, tmp_path: Path) -> None:
    load(case).save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert saved["model_type"] == "laguna", "saved in Kvell's own format"
    again, report = LagunaForCausalLM.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    wanted = logits_without_cache(reference(case), prompt())
    torch.testing.assert_close(logits_without_cache(again.eval(), prompt()), wanted, rtol=0, atol=1e-5)


@each_case
def test_what_transformers_saves_kvell_loads(case: str, tmp_path: Path) -> None:
    reference(case).save_pretrained(tmp_path)
    assert_same_logits(kvell.from_pretrained(tmp_path), case)


@pytest.mark.parametrize("fused_experts", [False, True])
@pytest.mark.parametrize("shared_expert", ["shared_expert", "shared_experts"])
@pytest.mark.parametrize("bias_owner", ["experts", "gate"])
def test_every_spelling_of_the_tensors_is_read(
    fused_experts: bool, shared_expert: str, bias_owner: str, tmp_path: Path
) -> None:
    tensors = laguna_tensors(
        reference(XS2), fused_experts=fused_experts, shared_expert=shared_expert, bias_owner=bias_owner
    )
    assert any("e_score_correction_bias" in name and tensor.any() for name, tensor in tensors.items())
    assert_same_logits(kvell.from_pretrained(write(tmp_path, released_config(XS2), tensors)), XS2)


def stacked_by_mlx(*, prefix: str = "language_model.", router: str = "gate.proj") -> dict[str, Tensor]:
    """The tensors as mlx's converters write them: the projections of all experts one over the other."""
    tensors = {}
    for name, tensor in laguna_tensors(reference(XS2), fused_experts=True, bias_owner="gate").items():
        layer = f"{prefix}{name.partition('.mlp.')[0]}.mlp"
        if name.endswith(".experts.gate_up_proj"):
            gate, up = tensor.chunk(2, dim=1)
            tensors |= {f"{layer}.switch_mlp.gate_proj.weight": gate, f"{layer}.switch_mlp.up_proj.weight": up}
        elif name.endswith(".experts.down_proj"):
            tensors[f"{layer}.switch_mlp.down_proj.weight"] = tensor
        else:
            tensors[prefix + name.replace(".mlp.gate.weight", f".mlp.{router}.weight")] = tensor
    return tensors


@pytest.mark.parametrize("router", ["gate", "gate.proj"])
@pytest.mark.parametrize("prefix", ["", "language_model."])
def test_experts_stacked_by_projection_behind_language_model_are_read(
    prefix: str, router: str, tmp_path: Path
) -> None:
    tensors = stacked_by_mlx(prefix=prefix, router=router)
    assert tensors[f"{prefix}model.layers.1.mlp.switch_mlp.gate_proj.weight"].shape == (8, 12, 32)
    assert f"{prefix}lm_head.weight" in tensors
    assert_same_logits(kvell.from_pretrained(write(tmp_path, released_config(XS2), tensors)), XS2)


@pytest.mark.parametrize("leaf", ["gate_proj", "up_proj", "down_proj"])
def test_a_stack_of_experts_that_is_missing_or_there_twice_is_named(leaf: str, tmp_path: Path) -> None:
    tensors = stacked_by_mlx(prefix="")
    name = f"model.layers.2.mlp.switch_mlp.{leaf}.weight"
    rest = {other: tensor for other, tensor in tensors.items() if other != name}
    with pytest.raises(kvell.CheckpointError, match=f"missing tensor .*model.layers.2.mlp.*{leaf}"):
        kvell.from_pretrained(write(tmp_path / "missing", released_config(XS2), rest))
    single = f"model.layers.2.mlp.experts.3.{leaf}.weight"
    twice = tensors | {single: tensors[name][3]}
    with pytest.raises(kvell.CheckpointError, match=r"both set layers\.2\.feed_forward") as refusal:
        kvell.from_pretrained(write(tmp_path / "twice", released_config(XS2), twice))
    assert single in str(refusal.value)
    wrong = tensors | {name: tensors[name][:, :-1]}
    with pytest.raises(kvell.CheckpointError, match=f"{name} has the shape"):
        kvell.from_pretrained(write(tmp_path / "shape", released_config(XS2), wrong))


def test_scales_for_a_quantised_cache_are_left_out(tmp_path: Path) -> None:
    tensors = laguna_tensors(reference(XS2))
    for layer in range(4):
        tensors[f"model.layers.{layer}.self_attn.k_scale"] = torch.ones(1)
        tensors[f"model.layers.{layer}.self_attn.v_scale"] = torch.ones(1)
    assert_same_logits(kvell.from_pretrained(write(tmp_path, released_config(XS2), tensors)), XS2)


@pytest.mark.parametrize(
    ("older", "case"),
    [
        ({"mlp_only_layers": [0], "decoder_sparse_step": 1, "norm_topk_prob": True}, XS2),
        ({"mlp_only_layers": [0, 1, 2, 3], "norm_topk_prob": True}, DENSE),
        ({"mlp_only_layers": [], "decoder_sparse_step": 1}, ALL_CHOSEN),
    ],
)
def test_the_older_spelling_of_dense_and_sparse_layers_is_read(older: dict, case: str, tmp_path: Path) -> None:
    config = released_config(case) | older
    del config["mlp_layer_types"]
    assert_same_logits(kvell.from_pretrained(write(tmp_path, config, laguna_tensors(reference(case)))), case)


def test_a_step_between_sparse_layers_counts_from_one(tmp_path: Path) -> None:
    """As the models that this spelling comes from have it: layer i is sparse where (i + 1) % step is 0."""
    config = released_config(XS2) | {"mlp_only_layers": [3], "decoder_sparse_step": 2}
    del config["mlp_layer_types"]
    types = ["dense", "sparse", "dense", "dense"]
    theirs = laguna(released_config(XS2) | {"mlp_layer_types": types})
    model = kvell.from_pretrained(write(tmp_path, config, laguna_tensors(theirs)))
    with torch.no_grad():
        wanted = logits_without_cache(theirs, prompt())
        torch.testing.assert_close(model(prompt()), wanted, rtol=0, atol=1e-4)


def test_a_rotary_fraction_at_the_top_is_that_of_sets_without_one(tmp_path: Path) -> None:
    """XS.2's file has one there too."""
    config = released_config(XS2) | {"partial_rotary_factor": 0.5}
    config["rope_parameters"] = json.loads(json.dumps(config["rope_parameters"]))
    del config["rope_parameters"][FULL]["partial_rotary_factor"]
    theirs = laguna(config)
    model = kvell.from_pretrained(write(tmp_path, config, laguna_tensors(theirs)))
    assert model.config == kvell.ModelConfig.from_pretrained(write(tmp_path / "own", released_config(XS2), {}))
    with torch.no_grad():
        torch.testing.assert_close(model(prompt()), logits_without_cache(theirs, prompt()), rtol=0, atol=1e-4)


def test_a_stray_number_beside_the_rotary_settings_is_no_setting(tmp_path: Path) -> None:
    """The released file repeats original_max_position_embeddings outside the types it belongs to."""
    config = released_config(XS2)
    config["rope_parameters"] = config["rope_parameters"] | {"original_max_position_embeddings": 4096}
    assert_same_logits(kvell.from_pretrained(write(tmp_path, config, laguna_tensors(reference(XS2)))), XS2)


@pytest.mark.parametrize("case", [XS2, M1, CAPPED])
def test_gradients_equal_those_of_transformers(case: str, load) -> None:
    model, theirs, tokens = load(case), reference(case), prompt()
    theirs.zero_grad()
    loss_of(logits_without_cache(theirs, tokens), tokens).backward()
    loss_of(model(tokens), tokens).backward()
    names = learnt_names(model, theirs)
    assert_gradients_agree(model, theirs, names)
    checkpointed = kvell.Decoder(model.config, activation_checkpointing=True)
    checkpointed.load_state_dict(model.state_dict())
    loss_of(checkpointed(tokens), tokens).backward()
    assert_gradients_agree(checkpointed, theirs, names)


@torch.no_grad()
def test_the_selection_bias_chooses_experts_and_does_not_weigh_them(load) -> None:
    model = load(XS2)
    router, x = model.layers[1].feed_forward.router, torch.randn(50, 32)
    step = Step.of(torch.zeros(50, dtype=torch.long), [50], None)
    before, _ = router(x, step)
    router.selection_bias.copy_(torch.tensor([9.0, 9.0, 9.0, 0, 0, 0, 0, 0]))
    weights, chosen = router(x, step)
    assert set(chosen.flatten().tolist()) == {0, 1, 2}
    scores = router.proj(x)[:, :3].sigmoid()
    wanted = (scores / scores.sum(-1, keepdim=True)).gather(1, chosen)
    torch.testing.assert_close(weights, wanted)
    assert not torch.allclose(weights, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_selection_bias_stays_in_fp32(dtype: torch.dtype, load) -> None:
    router = load(XS2, dtype=dtype).layers[1].feed_forward.router
    assert router.proj.weight.dtype == dtype
    assert router.selection_bias.dtype == torch.float32
    theirs = reference(XS2).model.layers[1].mlp.gate.e_score_correction_bias
    assert torch.equal(router.selection_bias, theirs)


@pytest.mark.parametrize(("name", "factor"), [("laguna-xs.2", 1.0), ("laguna-xs-2.1", XS_21_FACTOR)])
def test_the_attention_factor_is_the_final_scale_of_cos_and_sin(name: str, factor: float) -> None:
    """It was once dropped (vLLM pull request 46280) and once applied twice (sglang pull request 33558)."""
    config = kvell.ModelConfig.from_pretrained(name)
    full = [layer.attention for layer in config.layers if layer.attention.sliding_window is None]
    assert len(full) == 10
    for attention in full:
        table = rotary_table(attention.rotary, attention.head_dim, torch.tensor([0, 1000]), torch.float32)
        torch.testing.assert_close(table.cos[0], torch.full((32,), factor))
        torch.testing.assert_close(table.cos**2 + table.sin**2, torch.full((2, 32), factor**2))


def test_an_absent_attention_factor_is_the_papers(load) -> None:
    (rotary,) = {layer.attention.rotary for layer in load(UNSTATED).config.layers[:1]}
    assert rotary.scale() == pytest.approx(0.1 * math.log(16) + 1)


@torch.no_grad()
def test_the_attention_factor_scales_scores_once_on_each_side(tmp_path: Path) -> None:
    """Scores of the turning channels grow by its square: as if q_norm's turning weights grew by that."""
    factor, tensors = 1.5, laguna_tensors(reference(XS2))
    config = released_config(XS2)
    stated = config | {"rope_parameters": yarn(attention_factor=factor)}
    scaled = dict(tensors)
    turning = torch.cat([torch.full((8,), factor**2), torch.ones(8)])
    scaled["model.layers.0.self_attn.q_norm.weight"] = tensors["model.layers.0.self_attn.q_norm.weight"] * turning
    by_config = kvell.from_pretrained(write(tmp_path / "config", stated, tensors))
    by_weights = kvell.from_pretrained(write(tmp_path / "weights", config, scaled))
    torch.testing.assert_close(by_config(prompt()), by_weights(prompt()), rtol=0, atol=1e-4)


def test_end_token_24_is_kept_and_ends_a_text(load, tmp_path: Path) -> None:
    """A reader that keeps one end token of the two lets the text run past its turn."""
    assert kvell.ModelConfig.from_pretrained("laguna-xs.2").eos_token_ids == (2, 24)
    model = load(XS2)
    model.save_pretrained(tmp_path / "saved")
    assert kvell.ModelConfig.from_pretrained(tmp_path / "saved").eos_token_ids == (2, 24)
    with torch.no_grad():  # a head that says 24 and nothing else
        model.head.weight.zero_()
        model.head.weight[24] = 1
    model.norm.register_forward_hook(lambda module, inputs, output: torch.ones_like(output))
    pieces = list(kvell.generate(model, prompt()[0], max_new_tokens=9))
    assert pieces == [24]
    assert pieces[0].finish_reason == "eos"


@pytest.mark.parametrize(("gating", "gate"), [("per-head", "per_head"), ("per-element", "per_element")])
@torch.no_grad()
def test_the_gate_is_a_softplus_and_multiplies_the_attention_output(gating: str, gate: str, tmp_path: Path) -> None:
    """Ignoring it gives fluent garbage (vllm-metal pull request 562). A gate of softplus(0) multiplies by ln 2."""
    config = released_config(XS2) | {"gating": gating}
    tensors = laguna_tensors(laguna(config))
    for name in tensors:
        if "g_proj" in name:
            tensors[name] = torch.zeros_like(tensors[name])
    gated = kvell.from_pretrained(write(tmp_path, config, tensors))
    assert {layer.attention.output_gate for layer in gated.config.layers} == {gate}
    layers = tuple(
        layer.model_copy(update={"attention": layer.attention.model_copy(update={"output_gate": None})})
        for layer in gated.config.layers
    )
    ungated = kvell.Decoder(gated.config.model_copy(update={"layers": layers})).eval()
    weights = {name: tensor for name, tensor in gated.state_dict().items() if "g_proj" not in name}
    ungated.load_state_dict(weights)
    assert not torch.allclose(ungated(prompt()), gated(prompt()), atol=0.1)
    for layer in ungated.layers:
        layer.attention.o_proj.weight.mul_(math.log(2))
    torch.testing.assert_close(ungated(prompt()), gated(prompt()), rtol=0, atol=1e-4)


@torch.no_grad()
def test_full_layers_do_not_inherit_the_window(load) -> None:
    config = kvell.ModelConfig.from_pretrained("laguna-xs.2")
    assert [layer.attention.sliding_window for layer in config.layers] == [None, 512, 512, 512] * 10
    model, length = load(XS2), 60
    cache = model.make_cache()
    tokens = prompt(length)
    logits = model(tokens, cache=cache, last_only=True)
    rows = {layer: stream.count for (layer, _), stream in cache.sequences[0].streams.items()}
    assert rows == {0: length, 1: 4, 2: 4, 3: 4}
    # Three sliding layers reach back 3 x 4 tokens; only the full layer sees the first token.
    other = tokens.clone()
    other[0, 0] = tokens[0, 0] % 90 + 1
    assert (model(other)[:, -1:] - logits).abs().max() > 1e-3


def test_each_layer_has_its_own_number_of_query_heads(load) -> None:
    released = kvell.ModelConfig.from_pretrained("laguna-xs.2")
    assert [layer.attention.num_heads for layer in released.layers] == [48, 64, 64, 64] * 10
    assert {layer.attention.num_kv_heads for layer in released.layers} == {8}
    widths = [layer.attention.q_proj.out_features for layer in load(XS2).layers]
    assert widths == [6 * 16, 8 * 16, 8 * 16, 8 * 16]


@pytest.mark.parametrize("chunk", [1, 5, 23])
@pytest.mark.parametrize("case", [XS2, XS21])
@torch.no_grad()
def test_a_prefill_may_come_in_chunks(case: str, chunk: int, load) -> None:
    model, tokens = load(case), prompt(40)
    cache = model.make_cache()
    logits = [model(piece, cache=cache) for piece in tokens.split(chunk, dim=1)]
    wanted = logits_without_cache(reference(case), tokens)
    torch.testing.assert_close(torch.cat(logits, dim=1), wanted, rtol=0, atol=1e-4)


def test_tokens_for_which_several_experts_score_alike_are_routed_alike_in_every_chunk(load) -> None:
    model: kvell.Decoder = load(XS2)
    with torch.no_grad():
        for layer in model.layers[1:]:
            layer.feed_forward.router.proj.weight.zero_()
            layer.feed_forward.router.selection_bias.zero_()
        _, chosen = model.layers[1].feed_forward.router(
            torch.randn(7, 32), Step.of(torch.zeros(7, dtype=torch.long), [7], None)
        )
    assert chosen.tolist() == [[0, 1, 2]] * 7
