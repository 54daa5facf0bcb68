"""Gemma 4 agrees with transformers: logits, gradients, generation, and files in every spelling that is met."""

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from oracle import (
    FULL,
    GEMMA4,
    NEW_TOKENS,
    PROMPT_LENGTH,
    SLIDING,
    VOCAB,
    assert_gradients_agree,
    gemma4,
    gemma4_tensors,
    greedy,
    greedy_with_kvell,
    learnt_names,
    logits_without_cache,
    loss_of,
    prompt,
    write,
)
from shape_checks import unchecked
from torch import Tensor
from transformers import Gemma4ForCausalLM

import kvell
from kvell.layers.per_layer_embedding import MappedTable
from kvell.layers.rotary import DefaultRotary, ProportionalRotary
from kvell.step import Step

CASES = {
    "like E2B: wide shared layers, one KV head": {
        "num_hidden_layers": 8,
        "layer_types": [SLIDING, SLIDING, SLIDING, FULL] * 2,
        "num_kv_shared_layers": 4,
        "use_double_wide_mlp": True,
        "num_key_value_heads": 1,
    },
    "like E4B: sharing, a window as long as the prompt": {
        "num_hidden_layers": 12,
        "layer_types": ([SLIDING] * 5 + [FULL]) * 2,
        "num_kv_shared_layers": 6,
        "sliding_window": PROMPT_LENGTH,
    },
    "no sharing, no PLE, one head width, a window longer than everything": {
        "hidden_size_per_layer_input": 0,
        "global_head_dim": 8,
        "sliding_window": 200,
        "final_logit_softcapping": None,
    },
    "like 31B: values from keys in full layers, no sharing, no PLE": {
        "hidden_size_per_layer_input": 0,
        "attention_k_eq_v": True,
        "num_global_key_value_heads": 1,
        "sliding_window": 40,
    },
    "like 26B-A4B: experts beside the MLP, values from keys": {
        "hidden_size_per_layer_input": 0,
        "attention_k_eq_v": True,
        "num_global_key_value_heads": 1,
        "enable_moe_block": True,
        "num_experts": 6,
        "top_k_experts": 2,
        "moe_intermediate_size": 12,
    },
    "everything at once": {
        "num_hidden_layers": 7,
        "layer_types": [SLIDING, FULL, SLIDING, FULL, FULL, SLIDING, FULL],
        "num_kv_shared_layers": 3,
        "use_double_wide_mlp": True,
        "attention_k_eq_v": True,
        "num_global_key_value_heads": 1,
        "enable_moe_block": True,
        "num_experts": 4,
        "top_k_experts": 4,
        "moe_intermediate_size": 16,
        "attention_bias": True,
        "sliding_window": 2,
    },
    "layer types absent, the last layer full all the same": {
        "num_hidden_layers": 9,
        "layer_types": None,
        "num_kv_shared_layers": 3,
        "sliding_window": 7,
    },
    "sharing without PLE, biases, an untied head": {
        "hidden_size_per_layer_input": 0,
        "num_kv_shared_layers": 3,
        "attention_bias": True,
        "tie_word_embeddings": False,
        "sliding_window": PROMPT_LENGTH + 1,
    },
    "global KV heads stated but without k_eq_v, other rotary settings": {
        "num_global_key_value_heads": 1,
        "rope_parameters": {
            FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.5, "rope_theta": 5000.0},
            SLIDING: {"rope_type": "default", "rope_theta": 500.0},
        },
        "sliding_window": PROMPT_LENGTH - 1,
    },
    "full layers only": {
        "num_hidden_layers": 4,
        "layer_types": [FULL] * 4,
        "num_kv_shared_layers": 2,
        "use_double_wide_mlp": True,
        "num_attention_heads": 2,
    },
}
SHARING = [name for name, fields in CASES.items() if fields.get("num_kv_shared_layers")]
E2B, EVERYTHING = "like E2B: wide shared layers, one KV head", "everything at once"
MOE = "like 26B-A4B: experts beside the MLP, values from keys"

each_case = pytest.mark.parametrize("case", CASES)


def released_config(case: str) -> dict:
    return {name: value for name, value in (GEMMA4 | CASES[case]).items() if value is not None}


@cache
def reference(case: str) -> Gemma4ForCausalLM:
    return gemma4(released_config(case))


@pytest.fixture
def load(tmp_path: Path):
    def load(case: str, **arguments) -> kvell.Decoder:
        folder = write(tmp_path / "released", released_config(case), gemma4_tensors(reference(case)))
        return kvell.from_pretrained(folder, **arguments)

    return load


@torch.no_grad()
def assert_same_logits(model: kvell.Decoder, case: str, tokens: Tensor | None = None) -> None:
    tokens = prompt() if tokens is None else tokens
    torch.testing.assert_close(model(tokens), logits_without_cache(reference(case), tokens), rtol=0, atol=1e-4)


@each_case
def test_logits_equal_those_of_transformers(case: str, load) -> None:
    assert_same_logits(load(case), case)


@each_case
def test_64_greedy_tokens_equal_those_of_transformers(case: str, load) -> None:
    tokens, logits = greedy(reference(case), prompt())
    our_tokens, our_logits = greedy_with_kvell(load(case), prompt())
    assert our_tokens == tokens
    torch.testing.assert_close(our_logits, logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("case", [E2B, EVERYTHING, MOE])
def test_generate_says_what_transformers_says_up_to_the_end_token(case: str, load) -> None:
    model = load(case)
    tokens, _ = greedy(reference(case), prompt())
    ends = [index for index, token in enumerate(tokens) if token in model.config.eos_token_ids]
    wanted = tokens[: ends[0] + 1] if ends else tokens
    with unchecked():
        assert list(kvell.generate(model, prompt()[0], max_new_tokens=NEW_TOKENS)) == wanted


@each_case
@torch.no_grad()
def test_the_cache_changes_nothing_token_by_token(case: str, load) -> None:
    """Use_cache=False must not differ from use_cache=True (transformers issue 45242)."""
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
    assert saved["model_type"] == "gemma4_text", "saved in Kvell's own format"
    again, report = Gemma4ForCausalLM.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    wanted = logits_without_cache(reference(case), prompt())
    torch.testing.assert_close(logits_without_cache(again.eval(), prompt()), wanted, rtol=0, atol=1e-5)


@each_case
def test_what_transformers_saves_kvell_loads(case: str, tmp_path: Path) -> None:
    reference(case).save_pretrained(tmp_path)
    assert_same_logits(kvell.from_pretrained(tmp_path), case)


@each_case
def test_head_widths_may_be_spelled_per_layer(case: str, tmp_path: Path) -> None:
    """Released files say global_head_dim; files saved again say per_layer_config, with strings as keys."""
    config = released_config(case)
    own = {"head_dim": config.pop("global_head_dim")}
    kv_heads = config.pop("num_global_key_value_heads", None)
    if config.get("attention_k_eq_v"):
        own["num_key_value_heads"] = kv_heads
    types = reference(case).config.layer_types
    config["per_layer_config"] = {str(i): own for i, name in enumerate(types) if name == FULL}
    model = kvell.from_pretrained(write(tmp_path, config, gemma4_tensors(reference(case))))
    assert_same_logits(model, case)


@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model.", "language_model.", "model."])
@pytest.mark.parametrize("case", [E2B, MOE])
def test_a_multimodal_file_under_any_known_prefix_is_read(case: str, prefix: str, tmp_path: Path) -> None:
    """What belongs to pictures and sound, and unused keys of sharing layers, are left out."""
    config = {
        "model_type": "gemma4",
        "text_config": released_config(case),
        "vision_config": {"model_type": "gemma4_vision"},
        "audio_config": None,
        "eos_token_id": [1, 106],
    }
    tensors = gemma4_tensors(reference(case), prefix) | {
        "model.vision_tower.encoder.layers.0.self_attn.q_proj.linear.weight": torch.randn(4, 4),
        "model.audio_tower.layers.0.norm.weight": torch.randn(4),
        "model.embed_vision.embedding_projection.weight": torch.randn(4, 4),
        "model.embed_audio.embedding_projection.weight": torch.randn(4, 4),
    }
    if case == E2B:
        for name in ("k_proj.weight", "v_proj.weight", "k_norm.weight"):
            tensors[f"{prefix}layers.5.self_attn.{name}"] = torch.randn(8, 32)
    assert_same_logits(kvell.from_pretrained(write(tmp_path, config, tensors)), case)


def test_a_rotary_fraction_at_the_top_is_that_of_full_layers_without_one(tmp_path: Path) -> None:
    """Sliding layers turn whole heads, whatever is said."""
    sets = {
        FULL: {"rope_type": "proportional", "rope_theta": 1e6},
        SLIDING: {"rope_type": "default", "rope_theta": 1e4},
    }
    config = GEMMA4 | {"partial_rotary_factor": 0.5, "rope_parameters": sets}
    theirs = gemma4(config)
    model = kvell.from_pretrained(write(tmp_path, config, gemma4_tensors(theirs)))
    assert {layer.attention.rotary.fraction for layer in model.config.layers} == {0.5, 1.0}
    with torch.no_grad():
        torch.testing.assert_close(model(prompt()), logits_without_cache(theirs, prompt()), rtol=0, atol=1e-4)


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("rows", [VOCAB - 7, VOCAB + 7])
def test_the_per_layer_table_may_have_other_rows_than_the_vocabulary(rows: int, mapped: bool, tmp_path: Path) -> None:
    config = GEMMA4 | {"vocab_size_per_layer_input": rows}
    theirs, tokens = gemma4(config), prompt().clamp(max=VOCAB - 8)
    model = kvell.from_pretrained(write(tmp_path, config, gemma4_tensors(theirs)), map_per_layer_table=mapped)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), logits_without_cache(theirs, tokens), rtol=0, atol=1e-4)
    last = torch.tensor([[VOCAB - 1]])
    if rows > VOCAB:
        model(last)
    else:
        with pytest.raises(IndexError):
            logits_without_cache(theirs, last)
        with pytest.raises(
            kvell.InputError, match=f"token id {VOCAB - 1} has no per-layer embedding: there are {rows}"
        ):
            model(last)
    model.save_pretrained(tmp_path / "saved")
    assert kvell.ModelConfig.from_pretrained(tmp_path / "saved") == model.config


def test_a_unified_model_has_gemma_4s_decoder(tmp_path: Path) -> None:
    """The 12B: without per-layer embeddings, and with other towers."""
    unified = pytest.importorskip("transformers.models.gemma4_unified")
    alone = ("vocab_size_per_layer_input", "hidden_size_per_layer_input", "model_type")
    text = {name: value for name, value in GEMMA4.items() if name not in alone}
    config = unified.Gemma4UnifiedConfig(
        text_config=text | {"attention_k_eq_v": True, "num_global_key_value_heads": 1},
        vision_config={"mm_embed_dim": 32, "output_proj_dims": 32, "mm_posemb_size": 8, "patch_size": 2},
        audio_config={"audio_embed_dim": 8},
    )
    torch.manual_seed(0)
    theirs = unified.Gemma4UnifiedForConditionalGeneration(config).eval()
    theirs.save_pretrained(tmp_path)
    model = kvell.from_pretrained(tmp_path)
    assert model.config.per_layer_embedding is None
    with torch.no_grad():
        wanted = theirs(prompt(), use_cache=False).logits
        torch.testing.assert_close(model(prompt()), wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("case", [E2B, EVERYTHING, MOE])
def test_gradients_equal_those_of_transformers(case: str, load) -> None:
    model, theirs = load(case, map_per_layer_table=False), reference(case)
    tokens = prompt()
    theirs.zero_grad()
    loss_of(logits_without_cache(theirs, tokens), tokens).backward()
    loss_of(model(tokens), tokens).backward()
    assert_gradients_agree(model, theirs, learnt_names(model, theirs))


@pytest.mark.parametrize("case", SHARING)
def test_sharing_survives_activation_checkpointing(case: str, load) -> None:
    """The shared keys' producer once lost its sharing layers' gradients (unsloth-zoo pull request 813)."""
    plain, tokens = load(case, map_per_layer_table=False), prompt()
    checkpointed = kvell.Decoder(plain.config, activation_checkpointing=True)
    checkpointed.load_state_dict(plain.state_dict())
    for model in (plain, checkpointed):
        loss_of(model(tokens), tokens).backward()
    gradients = {name: parameter.grad for name, parameter in checkpointed.named_parameters()}
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("case", SHARING)
def test_a_producer_learns_from_the_layers_that_share_its_keys(case: str, checkpointing: bool, load) -> None:
    """What the producers read of their own keys is multiplied by zero: only sharing layers are left to learn from."""
    model = load(case)
    model.activation_checkpointing = checkpointing
    producers = [model.layers[i] for i in {layer.attention.kv_source for layer in model.config.layers} - {None}]
    assert producers
    for layer in producers:
        torch.nn.init.zeros_(layer.attention.o_proj.weight)
    loss_of(model(prompt()), prompt()).backward()
    for layer in producers:
        assert layer.attention.k_proj.weight.grad.norm() > 1e-4


@pytest.mark.parametrize("case", SHARING)
@torch.no_grad()
def test_sharing_layers_write_nothing_to_the_cache(case: str, load) -> None:
    """A sharing layer once overwrote its producer's rows (tpu-inference pull request 3406)."""
    model, tokens = load(case), prompt()
    first = next(i for i, layer in enumerate(model.config.layers) if layer.attention.kv_source is not None)

    def rows() -> dict[tuple[int, str], Tensor]:
        cache = model.make_cache()
        for chunk in tokens.split(9, dim=1):
            model(chunk, cache=cache)
        return {key: stream.held.clone() for key, stream in cache.sequences[0].streams.items()}

    before = rows()
    assert {layer for layer, _ in before} == set(range(first))
    for layer in model.layers[first:]:
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter))
    after = rows()
    assert all(torch.equal(after[key], held) for key, held in before.items())


@torch.no_grad()
def test_the_cache_holds_windows_of_sliding_layers_and_all_of_full_ones(load) -> None:
    model = load(E2B)
    cache = model.make_cache()
    model(prompt(), cache=cache)
    sliding, full = 4 * 1 * 8, PROMPT_LENGTH * 1 * 16  # rows x KV heads x head width
    assert cache.nbytes == 4 * 2 * (3 * sliding + full)


@pytest.mark.parametrize("length", [1, 4, 5, 6, 15, 80])
@pytest.mark.parametrize("case", [E2B, EVERYTHING])
@torch.no_grad()
def test_a_prefill_may_be_shorter_or_longer_than_the_window(case: str, length: int, load) -> None:
    """Sharing layers need the keys of the whole step, not what a window keeps of it (mlxcel issue 401)."""
    model, tokens = load(case), prompt(length + 3)
    cache = model.make_cache()
    logits = [model(tokens[:, :length], cache=cache), model(tokens[:, length:], cache=cache)]
    wanted = logits_without_cache(reference(case), tokens)
    torch.testing.assert_close(torch.cat(logits, dim=1), wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("chunk", [1, 2, 7, 23])
@pytest.mark.parametrize("case", [E2B, EVERYTHING])
@torch.no_grad()
def test_every_chunk_of_a_prefill_gets_its_own_tokens_per_layer_embeddings(case: str, chunk: int, load) -> None:
    """A later chunk once got the first chunk's (mlx-vlm pull request 901)."""
    model, tokens = load(case), prompt()
    cache = model.make_cache()
    logits = [model(piece, cache=cache) for piece in tokens.split(chunk, dim=1)]
    wanted = logits_without_cache(reference(case), tokens)
    torch.testing.assert_close(torch.cat(logits, dim=1), wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("case", SHARING)
@torch.no_grad()
def test_last_only_skips_the_sharing_layers_of_earlier_tokens_and_changes_nothing(case: str, load) -> None:
    model, tokens = load(case), prompt(30)
    cache = model.make_cache()
    seen: list[int] = []
    model.layers[-1].feed_forward.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    logits = [model(piece, cache=cache, last_only=True) for piece in tokens.split([21, 8, 1], dim=1)]
    assert seen == [1, 1, 1]
    wanted = logits_without_cache(reference(case), tokens)[:, [20, 28, 29]]
    torch.testing.assert_close(torch.cat(logits, dim=1), wanted, rtol=0, atol=1e-4)


@torch.no_grad()
def test_the_three_scales_of_per_layer_embeddings(load) -> None:
    """Any of them was once dropped (transformers pull request 45207)."""
    model, theirs, tokens = load(E2B), reference(E2B).model, prompt()
    embedded = theirs.embed_tokens(tokens)
    wanted = theirs.project_per_layer_inputs(embedded, theirs.get_per_layer_inputs(tokens, embedded))
    step = Step.of(tokens[0], [PROMPT_LENGTH], None)
    inputs = model.per_layer_inputs(embedded[0], step)
    torch.testing.assert_close(inputs, wanted[0], rtol=0, atol=1e-5)
    table = theirs.embed_tokens_per_layer.weight[tokens[0]].view(PROMPT_LENGTH, 8, 8)
    without_context = model.per_layer_inputs(torch.zeros_like(embedded[0]), step)
    torch.testing.assert_close(without_context, table * 8**0.5 / 2**0.5)


@torch.no_grad()
def test_token_embeddings_are_scaled_by_a_number_rounded_to_their_dtype(load) -> None:
    """sqrt(1536) = 39.19 becomes 39.25 in bfloat16."""
    config = kvell.ModelConfig.from_pretrained("gemma-4-e2b")
    assert config.embedding_scale == pytest.approx(39.19, abs=5e-3)
    assert torch.tensor(config.embedding_scale).to(torch.bfloat16).item() == 39.25
    model, tokens = load(E2B, dtype=torch.bfloat16), prompt()
    handed: list[Tensor] = []
    model.layers[0].register_forward_pre_hook(lambda module, inputs: handed.append(inputs[0]))
    model(tokens)
    wanted = reference(E2B).model.embed_tokens.weight[tokens[0]].bfloat16() * torch.tensor(32**0.5).bfloat16()
    assert torch.equal(handed[0], wanted)


@pytest.mark.parametrize("name", ["gemma-4-e2b", "gemma-4-e4b"])
def test_proportional_rotary_divides_by_the_full_head_width(name: str) -> None:
    """Dividing by the turning part instead is Megatron-Bridge issue 4195."""
    config = kvell.ModelConfig.from_pretrained(name)
    full = [layer.attention for layer in config.layers if layer.attention.sliding_window is None]
    sliding = [layer.attention for layer in config.layers if layer.attention.sliding_window is not None]
    for attention in full:
        assert attention.head_dim == 512
        assert isinstance(attention.rotary, ProportionalRotary)
        frequencies = attention.rotary.inverse_frequencies(512)
        wanted = torch.tensor([1e6 ** (-2 * i / 512) for i in range(64)] + [0.0] * 192)
        torch.testing.assert_close(frequencies, wanted)
    for attention in sliding:
        assert attention.head_dim == 256
        assert isinstance(attention.rotary, DefaultRotary)
        frequencies = attention.rotary.inverse_frequencies(256)
        torch.testing.assert_close(frequencies, torch.tensor([1e4 ** (-2 * i / 256) for i in range(128)]))


@torch.no_grad()
def test_layer_scalars_are_loaded_and_multiply_the_whole_residual(tmp_path: Path) -> None:
    """They are stored beside the parameters and were once left at one (verl pull request 7657)."""
    tensors = gemma4_tensors(reference(E2B))
    tensors["model.layers.3.layer_scalar"] = torch.tensor([0.0])
    model = kvell.from_pretrained(write(tmp_path, released_config(E2B), tensors))
    outputs: list[Tensor] = []
    model.layers[3].register_forward_hook(lambda module, inputs, output: outputs.append(output))
    model(prompt())
    assert torch.count_nonzero(outputs[0]) == 0


@torch.no_grad()
def test_sharing_layers_have_the_wide_mlp(load) -> None:
    """The doubling was once ignored (larql pull request 10)."""
    widths = [layer.feed_forward.up_proj.out_features for layer in load(E2B).layers]
    assert widths == [40] * 4 + [80] * 4
    released = kvell.ModelConfig.from_pretrained("gemma-4-e2b")
    assert [layer.feed_forward.intermediate_size for layer in released.layers] == [6144] * 15 + [12288] * 20


@pytest.mark.parametrize(
    ("name", "first", "sliding", "full"), [("gemma-4-e2b", 15, 13, 14), ("gemma-4-e4b", 24, 22, 23)]
)
def test_sharing_layers_read_the_last_producer_of_their_type(name: str, first: int, sliding: int, full: int) -> None:
    for index, layer in enumerate(kvell.ModelConfig.from_pretrained(name).layers):
        producer = full if layer.attention.sliding_window is None else sliding
        assert layer.attention.kv_source == (None if index < first else producer)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_mapped_table_of_per_layer_embeddings_gives_identical_results(
    stored: torch.dtype, wanted: torch.dtype, tmp_path: Path
) -> None:
    """Keeping it off the accelerator is transformers issue 47705."""
    tensors = {name: tensor.to(stored) for name, tensor in gemma4_tensors(reference(E2B)).items()}
    folder = write(tmp_path, released_config(E2B), tensors)
    mapped = kvell.from_pretrained(folder, dtype=wanted, map_per_layer_table=True)
    held = kvell.from_pretrained(folder, dtype=wanted, map_per_layer_table=False)
    assert isinstance(mapped.per_layer_inputs.table, MappedTable)
    assert mapped.per_layer_inputs.table.table.dtype == stored
    assert not isinstance(held.per_layer_inputs.table, MappedTable)
    assert mapped.num_parameters() == held.num_parameters()
    assert torch.equal(mapped(prompt()), held(prompt()))
    assert greedy_with_kvell(mapped, prompt(), 8)[0] == greedy_with_kvell(held, prompt(), 8)[0]


def test_a_large_table_is_mapped_on_the_cpu_without_being_asked(tmp_path: Path) -> None:
    config = released_config(E2B) | {"vocab_size": 2000, "vocab_size_per_layer_input": 2000}
    folder = write(tmp_path, config, gemma4_tensors(gemma4(config)))
    model = kvell.from_pretrained(folder)
    assert isinstance(model.per_layer_inputs.table, MappedTable)
    assert "per_layer_inputs.table.weight" not in dict(model.named_parameters())
    held = kvell.from_pretrained(folder, map_per_layer_table=False)
    with torch.no_grad():
        assert torch.equal(model(prompt()), held(prompt()))
    assert model.fingerprint() == held.fingerprint()
    model.per_layer_inputs.table.table[1234] += 0.1
    assert model.fingerprint() != held.fingerprint()


@torch.no_grad()
def test_a_mapped_table_survives_saving_and_a_change_of_dtype(tmp_path: Path) -> None:
    tensors = {name: tensor.bfloat16() for name, tensor in gemma4_tensors(reference(E2B)).items()}
    folder = write(tmp_path / "stored", released_config(E2B), tensors)
    model = kvell.from_pretrained(folder, dtype=torch.float32, map_per_layer_table=True)
    model.save_pretrained(tmp_path / "saved")
    again = kvell.from_pretrained(tmp_path / "saved", map_per_layer_table=False)
    assert torch.equal(again(prompt()), model(prompt()))
    narrow = kvell.from_pretrained(folder, dtype=torch.bfloat16, map_per_layer_table=False)
    assert torch.equal(model.to(torch.bfloat16)(prompt()), narrow(prompt()))


def test_end_tokens_are_gathered_from_every_file_that_names_them(tmp_path: Path) -> None:
    """Gemma 4's config may name 1 alone, its generation_config 1 and 106."""
    text = released_config(E2B) | {"vocab_size": 200, "vocab_size_per_layer_input": 200, "eos_token_id": 1}
    (tmp_path / "config.json").write_text(json.dumps(text))
    assert kvell.ModelConfig.from_pretrained(tmp_path).eos_token_ids == (1,)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 106]}))
    assert kvell.ModelConfig.from_pretrained(tmp_path).eos_token_ids == (1, 106)
    (tmp_path / "generation_config.json").unlink()
    nested = {"model_type": "gemma4", "text_config": text, "eos_token_id": [1, 106]}
    (tmp_path / "config.json").write_text(json.dumps(nested))
    assert kvell.ModelConfig.from_pretrained(tmp_path).eos_token_ids == (1, 106)
