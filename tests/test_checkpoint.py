"""Files in and out: nothing is lost, nothing is left random, and what does not fit is named."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import (
    DEEPSEEK_V4,
    FULL,
    GEMMA4,
    LAGUNA,
    SLIDING,
    ZAYA,
    gemma4,
    gemma4_tensors,
    laguna,
    laguna_tensors,
    logits_without_cache,
    prompt,
    write,
    yarn,
)
from safetensors.torch import load_file, save_file
from test_config import MIXED
from torch import Tensor
from transformers import AutoModelForCausalLM, LagunaForCausalLM

import kvell
from kvell.checkpoint.reading import INDEX, SINGLE
from kvell.families import FAMILIES, parse_config

GEMMA_CONFIG = GEMMA4 | {"num_kv_shared_layers": 3, "layer_types": [SLIDING, SLIDING, FULL] * 2}
LAGUNA_CONFIG = LAGUNA | {"rope_parameters": yarn(attention_factor=1.0)}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def released(family: str, folder: Path) -> Path:
    if family == "gemma4":
        return write(folder, GEMMA_CONFIG, gemma4_tensors(gemma4(GEMMA_CONFIG)))
    return write(folder, LAGUNA_CONFIG, laguna_tensors(laguna(LAGUNA_CONFIG)))


def mixed_model() -> kvell.Decoder:
    """A model of Kvell's own making, none of whose weights has the value that fresh ones have."""
    torch.manual_seed(1)
    model = kvell.Decoder(kvell.ModelConfig.from_dict(MIXED)).eval()
    with torch.no_grad():
        for name, tensor in model.named_tensors():
            tensor.copy_(torch.randn_like(tensor) * (1.0 if name.endswith("scalar") else 0.3) + (tensor == 1))
    return model


def some_model(family: str, tmp_path: Path) -> kvell.Decoder:
    return mixed_model() if family == "kvell" else kvell.from_pretrained(released(family, tmp_path / "released"))


def tokens_for(model: kvell.Decoder) -> Tensor:
    return prompt() % model.config.vocab_size


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


every_family = pytest.mark.parametrize("family", ["gemma4", "laguna", "kvell"])


@pytest.mark.parametrize("max_shard_bytes", [2**32, 9000, 1])
@every_family
@torch.no_grad()
def test_a_model_survives_saving(family: str, max_shard_bytes: int, tmp_path: Path) -> None:
    model = some_model(family, tmp_path)
    model.save_pretrained(tmp_path / "saved", max_shard_bytes=max_shard_bytes)
    again = kvell.from_pretrained(tmp_path / "saved", map_per_layer_table=False)
    assert again.config == model.config
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in again.state_dict().items())
    assert torch.equal(again(tokens_for(model)), model(tokens_for(model)))

    files = sorted(path.name for path in (tmp_path / "saved").iterdir())
    if max_shard_bytes == 2**32:
        assert files == ["config.json", "model.safetensors"]
        return
    index = json.loads((tmp_path / "saved" / "model.safetensors.index.json").read_text())
    shards = [name for name in files if name.startswith("model-")]
    assert files == ["config.json", *shards, "model.safetensors.index.json"]
    assert set(index["weight_map"].values()) == set(shards)
    stored = {name: load_file(tmp_path / "saved" / name) for name in shards}
    for tensors in stored.values():
        assert sum(tensor.nbytes for tensor in tensors.values()) <= max_shard_bytes or len(tensors) == 1
    total = sum(tensor.nbytes for tensors in stored.values() for tensor in tensors.values())
    assert index["metadata"]["total_size"] == total


@every_family
def test_saving_writes_the_released_format_where_there_is_one(family: str, tmp_path: Path) -> None:
    some_model(family, tmp_path).save_pretrained(tmp_path / "saved")
    values = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert values["model_type"] == {"gemma4": "gemma4_text"}.get(family, family)
    if family != "kvell":
        assert values["dtype"] == "float32"


@torch.no_grad()
def test_a_config_that_its_family_cannot_spell_is_saved_in_kvells_format(tmp_path: Path) -> None:
    model = some_model("laguna", tmp_path)
    first, *others = model.config.layers
    attention = first.attention.model_copy(update={"output_gate": None})
    layers = (first.model_copy(update={"attention": attention}), *others)
    mixed = kvell.Decoder(model.config.model_copy(update={"layers": layers})).eval()
    mixed.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["model_type"] == "kvell"
    again = kvell.from_pretrained(tmp_path / "saved")
    assert again.config == mixed.config
    assert torch.equal(again(prompt()), mixed(prompt()))


@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("wanted", [None, *DTYPES, torch.float64])
@pytest.mark.parametrize("family", ["gemma4", "laguna"])
def test_weights_are_converted_on_the_way_in(
    family: str, stored: torch.dtype, wanted: torch.dtype | None, tmp_path: Path
) -> None:
    folder = released(family, tmp_path)
    tensors = load_file(folder / "model.safetensors")
    as_stored = {
        name: tensor if name.endswith("score_correction_bias") else tensor.to(stored)
        for name, tensor in tensors.items()
    }
    save_file(as_stored, folder / "model.safetensors")
    model = kvell.from_pretrained(folder, dtype=wanted, map_per_layer_table=False)
    assert model.dtype == (wanted or stored)
    for name, tensor in model.named_tensors():
        assert tensor.dtype == (torch.float32 if name.endswith("selection_bias") else wanted or stored)
    name = "model.layers.1.self_attn.q_proj.weight"
    assert torch.equal(model.layers[1].attention.q_proj.weight, as_stored[name].to(wanted or stored))
    assert not model.training
    with torch.no_grad():
        assert model(prompt()).isfinite().all()


def edit(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Changes the tensors of a single-file checkpoint."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")


Q_PROJ, NORM = "model.layers.2.self_attn.q_proj.weight", "model.layers.1.input_layernorm.weight"
BIAS = "model.layers.1.mlp.experts.e_score_correction_bias"
MISFITS: dict[str, tuple[str, Callable[[dict[str, Tensor]], object], list[str]]] = {
    "a missing tensor": ("gemma4", lambda t: t.pop(NORM), ["missing tensor", NORM]),
    "a missing layer_scalar": (
        "gemma4",
        lambda t: t.pop("model.layers.3.layer_scalar"),
        ["missing tensor", "layers.3.layer_scalar"],
    ),
    "a missing embedding": (
        "laguna",
        lambda t: t.pop("model.embed_tokens.weight"),
        ["missing tensor", "model.embed_tokens.weight"],
    ),
    "a missing table": (
        "gemma4",
        lambda t: t.pop("model.embed_tokens_per_layer.weight"),
        ["missing tensor", "model.embed_tokens_per_layer.weight"],
    ),
    "a missing untied head": ("laguna", lambda t: t.pop("lm_head.weight"), ["missing tensor", "lm_head.weight"]),
    "a missing expert": (
        "laguna",
        lambda t: t.pop("model.layers.2.mlp.experts.5.up_proj.weight"),
        ["missing tensor", "model.layers.2.mlp.experts.5.up_proj.weight"],
    ),
    "a missing selection bias": ("laguna", lambda t: t.pop(BIAS), ["missing tensor", BIAS]),
    "an unexpected tensor": (
        "gemma4",
        lambda t: t.update({"model.layers.2.self_attn.sinks": torch.ones(4)}),
        ["unexpected tensor", "model.layers.2.self_attn.sinks"],
    ),
    "keys of a layer that does not share": (
        "laguna",
        lambda t: t.update({"model.layers.2.self_attn.k_proj.bias": torch.ones(32)}),
        ["unexpected tensor", "model.layers.2.self_attn.k_proj.bias"],
    ),
    "a layer too many": (
        "gemma4",
        lambda t: t.update({"model.layers.6.input_layernorm.weight": torch.ones(32)}),
        ["unexpected tensor", "model.layers.6.input_layernorm.weight"],
    ),
    "an expert too many": (
        "laguna",
        lambda t: t.update({"model.layers.2.mlp.experts.8.up_proj.weight": torch.ones(12, 32)}),
        ["unexpected tensor", "model.layers.2.mlp.experts.8.up_proj.weight"],
    ),
    "a wrong shape": (
        "gemma4",
        lambda t: t.update({Q_PROJ: torch.ones(64, 31)}),
        [Q_PROJ, "[64, 31]", "[64, 32]"],
    ),
    "a transposed matrix": (
        "laguna",
        lambda t: t.update({"model.layers.0.mlp.down_proj.weight": torch.ones(40, 32)}),
        ["model.layers.0.mlp.down_proj.weight", "[40, 32]", "[32, 40]"],
    ),
    "an expert of a wrong shape": (
        "laguna",
        lambda t: t.update({"model.layers.2.mlp.experts.5.up_proj.weight": torch.ones(13, 32)}),
        ["model.layers.2.mlp.experts.5.up_proj.weight", "[13, 32]", "[12, 32]"],
    ),
    "a shape that would broadcast": (
        "laguna",
        lambda t: t.update({"model.layers.2.mlp.experts.5.up_proj.weight": torch.ones(1, 32)}),
        ["model.layers.2.mlp.experts.5.up_proj.weight", "[1, 32]", "[12, 32]"],
    ),
    "a tensor under two prefixes": (
        "gemma4",
        lambda t: t.update({"model.language_model." + NORM.removeprefix("model."): torch.ones(32)}),
        [NORM, "model.language_model.layers.1.input_layernorm.weight"],
    ),
    "a selection bias in both places": (
        "laguna",
        lambda t: t.update({BIAS.replace("experts", "gate"): torch.ones(8)}),
        [BIAS, BIAS.replace("experts", "gate")],
    ),
    "a shared expert spelled in both ways": (
        "laguna",
        lambda t: t.update({"model.layers.1.mlp.shared_experts.up_proj.weight": torch.ones(20, 32)}),
        ["shared_experts.up_proj.weight", "shared_expert.up_proj.weight"],
    ),
    "experts both fused and single": (
        "laguna",
        lambda t: t.update({"model.layers.1.mlp.experts.down_proj": torch.ones(8, 32, 12)}),
        ["model.layers.1.mlp.experts.down_proj and model.layers.1.mlp.experts.", ".down_proj.weight"],
    ),
    "integers": (
        "gemma4",
        lambda t: t.update({Q_PROJ: torch.ones(64, 32, dtype=torch.int8)}),
        [Q_PROJ, "int8"],
    ),
    "eight-bit floats without scales": (
        "laguna",
        lambda t: t.update({NORM: torch.ones(32).to(torch.float8_e4m3fn)}),
        [NORM, "float8_e4m3fn", "scales"],
    ),
    "truth values": (
        "gemma4",
        lambda t: t.update({NORM: torch.ones(32, dtype=torch.bool)}),
        [NORM, "torch.bool, wanted is one of bfloat16, float32"],
    ),
    "complex numbers": (
        "gemma4",
        lambda t: t.update({NORM: torch.ones(32, dtype=torch.complex64)}),
        [NORM, "torch.complex64, wanted is one of bfloat16, float32"],
    ),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_a_checkpoint_that_does_not_fit_is_refused_in_one_line_that_names_the_tensor(
    misfit: str, tmp_path: Path
) -> None:
    family, change, words = MISFITS[misfit]
    folder = released(family, tmp_path)
    edit(folder, change)
    with pytest.raises(kvell.CheckpointError) as refusal:
        kvell.from_pretrained(folder)
    message = str(refusal.value)
    assert message.startswith(str(folder))
    assert "\n" not in message
    for word in words:
        assert word in message


def test_a_tensor_that_does_not_fit_is_refused_with_its_shard(tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    some_model("laguna", tmp_path).save_pretrained(folder, max_shard_bytes=20000)
    shard = max(folder.glob("model-*.safetensors"))
    tensors = load_file(shard)
    name = next(iter(tensors))
    for wrong in ({name: torch.ones(3, 5, 7)}, {"sinks": torch.ones(4)}):
        save_file(tensors | wrong, shard)
        with pytest.raises(kvell.CheckpointError, match=f"^{shard}: .*{next(iter(wrong))}"):
            kvell.from_pretrained(folder)


def cut(path: Path, keep: float) -> None:
    os.truncate(path, int(path.stat().st_size * keep))


FIRST = "model-00001"
DAMAGES: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "a missing shard": (lambda shard: shard.unlink(), [FIRST, "missing"]),
    "a shard cut short in its tensors": (lambda shard: cut(shard, 0.9), [FIRST]),
    "a shard cut short in its header": (lambda shard: cut(shard, 0.01), [FIRST]),
    "an empty shard": (lambda shard: cut(shard, 0), [FIRST]),
    "a shard of other tensors": (lambda shard: save_file({"x": torch.ones(1)}, shard), [FIRST]),
    "a missing index": (
        lambda shard: shard.with_name("model.safetensors.index.json").unlink(),
        ["model.safetensors", "model.safetensors.index.json"],
    ),
    "a damaged index": (
        lambda shard: shard.with_name("model.safetensors.index.json").write_text('{"weight'),
        ["model.safetensors.index.json"],
    ),
    "an index without its map": (
        lambda shard: shard.with_name("model.safetensors.index.json").write_text('{"metadata": {}}'),
        ["model.safetensors.index.json", "weight_map"],
    ),
    "an index of a list": (
        lambda shard: shard.with_name("model.safetensors.index.json").write_text('{"weight_map": ["x"]}'),
        ["model.safetensors.index.json", "weight_map"],
    ),
    "an index of nothing": (
        lambda shard: shard.with_name("model.safetensors.index.json").write_text('{"weight_map": null}'),
        ["model.safetensors.index.json", "weight_map"],
    ),
    "an index of numbers": (
        lambda shard: shard.with_name("model.safetensors.index.json").write_text('{"weight_map": {"x": 1}}'),
        ["model.safetensors.index.json", "weight_map"],
    ),
    "an index that is a list": (
        lambda shard: shard.with_name("model.safetensors.index.json").write_text("[1]"),
        ["model.safetensors.index.json"],
    ),
    "a config nested too deeply": (
        lambda shard: shard.with_name("config.json").write_text("[" * 100_000),
        ["config.json", "nested"],
    ),
    "no config": (lambda shard: shard.with_name("config.json").unlink(), ["config.json"]),
    "a config that is no JSON": (
        lambda shard: shard.with_name("config.json").write_text("{'model_type': 1}"),
        ["config.json"],
    ),
    "a config that is a list": (lambda shard: shard.with_name("config.json").write_text("[]"), ["config.json"]),
    "a config that is no text": (
        lambda shard: shard.with_name("config.json").write_bytes(b"\xff\xfe\x00"),
        ["config.json"],
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_refused_in_one_line_that_names_the_file(damage: str, tmp_path: Path) -> None:
    some_model("laguna", tmp_path).save_pretrained(tmp_path / "saved", max_shard_bytes=20000)
    do, words = DAMAGES[damage]
    do(next((tmp_path / "saved").glob(f"{FIRST}-of-*.safetensors")))
    with pytest.raises(kvell.CheckpointError) as refusal:
        kvell.from_pretrained(tmp_path / "saved")
    message = str(refusal.value)
    assert "\n" not in message
    for word in [*words, str(tmp_path / "saved")]:
        assert word in message


def test_a_tensor_in_two_shards_is_refused_with_both_files(tmp_path: Path) -> None:
    """Also where the index knows only one of them."""
    folder = tmp_path / "saved"
    some_model("laguna", tmp_path).save_pretrained(folder, max_shard_bytes=20000)
    first, second, *_ = sorted(folder.glob("model-*.safetensors"))
    name, tensor = next(iter(load_file(first).items()))
    save_file(load_file(second) | {name: torch.zeros_like(tensor)}, second)
    with pytest.raises(kvell.CheckpointError) as refusal:
        kvell.from_pretrained(folder)
    for word in (str(first), str(second), name):
        assert word in str(refusal.value)


def test_a_single_file_cut_short_is_refused(tmp_path: Path) -> None:
    folder = released("gemma4", tmp_path)
    cut(folder / "model.safetensors", 0.5)
    with pytest.raises(kvell.CheckpointError, match=r"model\.safetensors"):
        kvell.from_pretrained(folder)


RELEASED = {
    "gemma4": (GEMMA4 | {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 8}),
    "laguna": LAGUNA,
    "zaya": ZAYA,
    "deepseek_v4": DEEPSEEK_V4,
}


@pytest.mark.parametrize(("counted", "given", "stored"), [("layers", 1000, 6), ("experts", 60000, 2)])
@pytest.mark.parametrize("family", RELEASED)
def test_a_count_that_no_tensors_bear_out_is_refused_at_once(
    family: str, counted: str, given: int, stored: int, tmp_path: Path
) -> None:
    """Before a table of names is made for all of them."""
    key = "num_hidden_layers" if counted == "layers" else FAMILIES[family].experts
    by_layer = ("types", "per_layer", "ratios")
    config = {name: value for name, value in RELEASED[family].items() if not name.endswith(by_layer)} | {key: given}
    experts = "local_experts" if family == "zaya" else "experts"
    names = [f"model.layers.{layer}.mlp.{experts}.{expert}.w1.weight" for layer in range(6) for expert in range(2)]
    folder = write(tmp_path, config, {name: torch.ones(2) for name in names})
    tracemalloc.start()
    start = time.monotonic()
    try:
        with pytest.raises(kvell.ConfigError, match=f"{key} is {given}, and there are tensors of {stored}\\Z"):
            kvell.from_pretrained(folder)
        assert tracemalloc.get_traced_memory()[1] < 100e6
    finally:
        tracemalloc.stop()
    assert time.monotonic() - start < 10  # traced, and beside other work; a table of names takes minutes


def test_experts_in_one_tensor_are_counted_by_its_rows(tmp_path: Path) -> None:
    tensors = {f"model.layers.{layer}.mlp.experts.down_proj": torch.ones(8, 2, 2) for layer in range(4)}
    folder = write(tmp_path, LAGUNA | {"num_experts": 60000}, tensors)
    with pytest.raises(kvell.ConfigError, match="num_experts is 60000, and there are tensors of 8"):
        kvell.from_pretrained(folder)


def test_a_config_by_hand_may_stand_beside_kvells_own_tensors(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = kvell.Decoder(kvell.ModelConfig.from_dict(MIXED)).eval()
    model.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(MIXED))
    loaded = kvell.from_pretrained(tmp_path)
    assert loaded.config == model.config
    with torch.no_grad():
        assert torch.equal(loaded(prompt() % 50), model(prompt() % 50))


def test_a_config_without_a_model_type_or_layers_says_so(tmp_path: Path) -> None:
    folder = write(tmp_path, {"hidden_size": 3}, {"x": torch.ones(1)})
    with pytest.raises(kvell.ConfigError, match="model_type is missing, known are kvell, "):
        kvell.from_pretrained(folder)


def test_unknown_keys_are_left_out_where_that_is_asked_for(tmp_path: Path) -> None:
    folder = write(tmp_path, LAGUNA | {"new_key": 1}, laguna_tensors(laguna(LAGUNA)))
    with pytest.raises(kvell.ConfigError, match="laguna config: new_key: unknown"):
        kvell.from_pretrained(folder)
    with pytest.warns(UserWarning, match="unknown keys are left out: new_key") as warned:
        model = kvell.from_pretrained(folder, strict=False)
    assert len(warned) == 1
    with pytest.warns(UserWarning, match="new_key"):
        assert kvell.ModelConfig.from_pretrained(folder, strict=False) == model.config


def test_a_directory_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(kvell.CheckpointError, match="nowhere"):
        kvell.from_pretrained(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(kvell.KvellError, match="file"):
        kvell.from_pretrained(tmp_path / "file")


@torch.no_grad()
def test_what_a_text_decoder_has_no_use_for_is_left_out_by_rule(tmp_path: Path) -> None:
    folder = released("gemma4", tmp_path)
    wanted = kvell.from_pretrained(folder)(prompt())
    edit(
        folder,
        lambda tensors: tensors.update(
            {
                "model.vision_tower.patch_embedder.input_proj.weight": torch.randn(3, 3),
                "vision_tower.std_bias": torch.randn(3),
                "model.audio_tower.layers.0.feed_forward1.ffw_layer_1.linear.weight": torch.randn(3, 3),
                "model.embed_vision.embedding_projection.weight": torch.randn(3, 3),
                "embed_audio.embedding_projection.weight": torch.randn(3, 3),
                "model.layers.4.self_attn.k_proj.weight": torch.randn(16, 32),
                "model.layers.4.self_attn.v_proj.weight": torch.randn(16, 32),
                "model.layers.4.self_attn.k_norm.weight": torch.randn(8),
            }
        ),
    )
    assert torch.equal(kvell.from_pretrained(folder)(prompt()), wanted)


@pytest.mark.parametrize(
    "name", ["model.layers.1.self_attn.k_bias", "model.layers.9.self_attn.k_proj.weight", "model.vision.weight"]
)
def test_a_rule_leaves_out_nothing_but_what_it_is_for(name: str, tmp_path: Path) -> None:
    folder = released("gemma4", tmp_path)
    edit(folder, lambda tensors: tensors.update({name: torch.randn(16, 32)}))
    with pytest.raises(kvell.CheckpointError, match=name):
        kvell.from_pretrained(folder)


@pytest.mark.parametrize("max_shard_bytes", [2**32, 9000])
@every_family
@torch.no_grad()
def test_a_model_can_be_saved_over_the_files_it_reads_from(family: str, max_shard_bytes: int, tmp_path: Path) -> None:
    """Its weights are views of those files."""
    folder = tmp_path / "saved"
    some_model(family, tmp_path).save_pretrained(folder, max_shard_bytes=20000)
    model = kvell.from_pretrained(folder)
    before = model(tokens_for(model))
    model.norm.weight.mul_(2)
    model.save_pretrained(folder, max_shard_bytes=max_shard_bytes)
    again = kvell.from_pretrained(folder)
    assert not torch.equal(before, again(tokens_for(model)))
    assert torch.equal(model(tokens_for(model)), again(tokens_for(model)))
    index = folder / "model.safetensors.index.json"
    assert index.exists() == (max_shard_bytes == 9000)
    shards = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else {"model.safetensors"}
    assert {path.name for path in folder.iterdir()} - {index.name} == {"config.json", *shards}


class Killed(BaseException):
    """What no handler of the library sees, as if the process were gone."""


@pytest.mark.parametrize(
    "config_changes", [{}, {"norm_eps": 0.125}, {"suppress_tokens": (3,)}], ids=["nothing", "config", "generation"]
)
@pytest.mark.parametrize("sizes", [(60000, 60000), (2**32, 60000), (60000, 2**32), (2**32, 2**32)])
@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), Killed()])
def test_a_save_that_fails_or_is_killed_at_any_rename_leaves_no_mixture(
    failure: BaseException,
    sizes: tuple[int, int],
    config_changes: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever loads afterwards is all old or all new, and what is called unchanged is."""
    some_model("laguna", tmp_path).save_pretrained(tmp_path / "old", max_shard_bytes=sizes[0])
    model = kvell.from_pretrained(tmp_path / "old")
    old = {name: tensor.clone() for name, tensor in model.named_tensors()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    model.config = model.config.model_copy(update=config_changes)
    new = dict(model.named_tensors())
    replace = os.replace
    for failing in range(100):
        folder, renames = tmp_path / f"new-{failing}", 0
        shutil.copytree(tmp_path / "old", folder)

        def flaky(source: Path, target: Path, failing: int = failing) -> None:
            nonlocal renames
            renames += 1
            if renames == failing + 1:
                raise failure
            replace(source, target)

        monkeypatch.setattr(os, "replace", flaky)
        message = ""
        try:
            model.save_pretrained(folder, max_shard_bytes=sizes[1])
        except kvell.CheckpointError as error:
            message = str(error)
        except Killed:
            message = "killed"
        monkeypatch.undo()
        if "unchanged" in message:
            assert contents(folder) == contents(tmp_path / "old")
        try:
            loaded = kvell.from_pretrained(folder)
        except kvell.CheckpointError:
            assert "unchanged" not in message
            former = (folder / ".former-config.json").read_bytes()
            assert former == (tmp_path / "old" / "config.json").read_bytes()
        else:
            is_new = torch.equal(loaded.norm.weight, new["norm.weight"])
            assert (loaded.config == model.config) == (is_new or not config_changes)
            for name, tensor in loaded.named_tensors():
                assert torch.equal(tensor, (new if is_new else old)[name]), name
        model.save_pretrained(folder, max_shard_bytes=sizes[1])
        files = {path.name for path in folder.iterdir()}
        assert ".former-config.json" not in files
        again = kvell.from_pretrained(folder)
        assert torch.equal(again.norm.weight, new["norm.weight"])
        index = folder / "model.safetensors.index.json"
        shards = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else {SINGLE}
        assert {name for name in files if name.endswith(".safetensors")} == shards
        if not message:
            assert failing >= 1
            return
    raise AssertionError("more renames than a save can need")


def test_changing_a_loaded_model_does_not_change_its_files(tmp_path: Path) -> None:
    folder = released("laguna", tmp_path)
    before = contents(folder)
    model = kvell.from_pretrained(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    del model
    assert contents(folder) == before


def without_room(script: str, *arguments: Path) -> None:
    """Runs a script in a process that may write no file of more than 4096 bytes, as if the disk were full."""
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))"
    code = f"import sys, kvell, torch\n{limit}\n{script}"
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr


def test_a_full_disk_leaves_the_old_model_and_no_scratch(tmp_path: Path) -> None:
    folder = released("laguna", tmp_path / "old")
    before = contents(tmp_path)
    without_room(
        """
model = kvell.from_pretrained(sys.argv[1])
for target in sys.argv[1:]:
    for size in (2**32, 20000):
        try:
            model.save_pretrained(target, max_shard_bytes=size)
        except kvell.CheckpointError as error:
            message = str(error)
            assert target in message and "unchanged" in message and chr(10) not in message, message
        else:
            raise SystemExit("saved without room")
""",
        folder,
        tmp_path / "new",
    )
    assert contents(tmp_path) == before
    assert not any("saving" in path.name for path in tmp_path.rglob("*"))


def test_a_full_disk_leaves_the_old_cache_and_no_scratch(tmp_path: Path) -> None:
    folder = released("laguna", tmp_path / "model")
    model, path = kvell.from_pretrained(folder), tmp_path / "prompt.cache"
    cache = model.make_cache()
    model(prompt(), cache=cache)
    cache.save(path)
    before = contents(tmp_path)
    without_room(
        """
model = kvell.from_pretrained(sys.argv[1])
cache = model.make_cache()
model(torch.ones(1, 100, dtype=torch.long), cache=cache)
try:
    cache.save(sys.argv[2])
except kvell.KvellError as error:
    message = str(error)
    assert "prompt.cache" in message or str(sys.argv[2]).rsplit("/", 1)[0] in message, message
    assert chr(10) not in message, message
else:
    raise SystemExit("saved without room")
""",
        folder,
        path,
    )
    assert contents(tmp_path) == before
    assert not any("saving" in path.name for path in tmp_path.rglob("*"))
    loaded = kvell.Cache.load(path, model)
    step = torch.tensor([[5]])
    assert torch.equal(model(step, cache=loaded), model(step, cache=cache))


@every_family
def test_saving_replaces_files_and_never_writes_into_them(family: str, tmp_path: Path) -> None:
    """Whoever still has the old file open, or linked, keeps it whole."""
    model = some_model(family, tmp_path)
    cache = model.make_cache()
    model(tokens_for(model), cache=cache)
    for _ in range(2):
        model.save_pretrained(tmp_path / "saved")
        cache.save(tmp_path / "saved" / "prompt.cache")
        if not (tmp_path / "linked").exists():
            shutil.copytree(tmp_path / "saved", tmp_path / "linked", copy_function=os.link)
            before = contents(tmp_path / "linked")
            with torch.no_grad():
                model.norm.weight.add_(1)
            model(tokens_for(model), cache=cache)
    assert contents(tmp_path / "linked") == before
    after = contents(tmp_path / "saved")
    assert after["model.safetensors"] != before["model.safetensors"]
    assert after["prompt.cache"] != before["prompt.cache"]


def test_a_model_is_not_saved_where_a_file_stands(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(kvell.CheckpointError, match="file"):
        mixed_model().save_pretrained(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_other_files_of_a_directory_stay_when_a_model_is_saved_there(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "README.md").write_text("about")
    mixed_model().save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "README.md",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    }


@torch.no_grad()
def test_a_moved_checkpoint_is_the_same_model(tmp_path: Path) -> None:
    """Nothing in the files refers to where they are; a cache saved by one copy is the other's too."""
    one = kvell.from_pretrained(released("laguna", tmp_path / "one"))
    cache = one.make_cache()
    one(prompt(), cache=cache)
    cache.save(tmp_path / "prompt.cache")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    two = kvell.from_pretrained(tmp_path / "two")
    loaded = kvell.Cache.load(tmp_path / "prompt.cache", two)
    step = torch.tensor([[5]])
    assert torch.equal(one(step, cache=cache), two(step, cache=loaded))


# Which files a model's tensors are in.


def sharded(folder: Path, tmp_path: Path) -> list[Path]:
    """Laguna's model in shards; these, in order."""
    some_model("laguna", tmp_path).save_pretrained(folder, max_shard_bytes=20000)
    return sorted(folder.glob("model-*.safetensors"))


@pytest.mark.parametrize("old_shards", ["still there", "gone"])
def test_a_single_file_is_the_model_and_an_index_beside_it_is_not_read(old_shards: str, tmp_path: Path) -> None:
    """As in transformers, which saves a model again in one file, deletes the shards and leaves their index."""
    folder = tmp_path / "saved"
    shards = sharded(folder, tmp_path)
    tensors = load_file(released("laguna", tmp_path / "again") / SINGLE)
    save_file({name: tensor * 2 for name, tensor in tensors.items()}, folder / SINGLE, {"format": "pt"})
    if old_shards == "gone":
        for shard in shards:
            shard.unlink()
    assert (folder / INDEX).exists()
    model = kvell.from_pretrained(folder)
    assert torch.equal(model.embedding.weight, tensors["model.embed_tokens.weight"] * 2)
    theirs = LagunaForCausalLM.from_pretrained(folder)
    assert torch.equal(theirs.model.embed_tokens.weight, model.embedding.weight)


def place(folder: Path, name: str) -> None:
    """Edits an index so that all its tensors are in the file `name`."""
    index = folder / INDEX
    values = json.loads(index.read_text())
    index.write_text(json.dumps(values | {"weight_map": dict.fromkeys(values["weight_map"], name)}))


@pytest.mark.parametrize(
    "name", ["../secret", "/etc/secret", "..", ".", "", "in/here", "a\\b", "a\nb", "a\0b", "a" * 999]
)
def test_a_shard_is_the_name_of_a_file_in_the_folder(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    (first, *_) = sharded(folder, tmp_path)
    shutil.copy(first, tmp_path / "secret")
    (folder / "in").mkdir()
    shutil.copy(first, folder / "in" / "here")
    place(folder, name)
    with pytest.raises(
        kvell.CheckpointError, match=r"which is not the name of a file in the same folder$"
    ) as refusal:
        kvell.from_pretrained(folder)
    assert "\n" not in str(refusal.value)
    assert str(folder / INDEX) in str(refusal.value)


@pytest.mark.parametrize("absolute", [True, False])
def test_a_link_out_of_the_folder_is_not_followed(absolute: bool, tmp_path: Path) -> None:
    """Neither of a shard nor of a single file."""
    single, folder = released("laguna", tmp_path / "single"), tmp_path / "saved"
    for file in (single / SINGLE, sharded(folder, tmp_path)[0]):
        outside = tmp_path / f"outside-{file.name}"
        os.replace(file, outside)
        file.symlink_to(outside if absolute else Path("..") / outside.name)
        with pytest.raises(kvell.CheckpointError, match="is a link to") as refusal:
            kvell.from_pretrained(file.parent)
        for word in (str(file), str(outside)):
            assert word in str(refusal.value)


def test_links_within_the_folder_and_to_the_folder_are_followed(tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    (first, *_) = sharded(folder, tmp_path)
    os.replace(first, folder / "elsewhere")
    first.symlink_to("elsewhere")
    (tmp_path / "linked").symlink_to(folder)
    assert kvell.from_pretrained(tmp_path / "linked").config == kvell.from_pretrained(folder).config


def test_the_hubs_cache_is_a_folder_of_links_and_loads(tmp_path: Path) -> None:
    """models--ORG--NAME/snapshots/REVISION/file -> ../../blobs/DIGEST; but not into another repository's."""
    repository, other = tmp_path / "hub" / "models--org--name", tmp_path / "hub" / "models--org--other"
    snapshot = repository / "snapshots" / "0123abcd"
    shards = sharded(snapshot, tmp_path)
    (repository / "blobs").mkdir()
    for number, file in enumerate([*shards, snapshot / INDEX, snapshot / "config.json"]):
        os.replace(file, repository / "blobs" / f"digest{number}")
        file.symlink_to(Path("..") / ".." / "blobs" / f"digest{number}")
    assert kvell.from_pretrained(snapshot).config.family == "laguna"
    (other / "blobs").mkdir(parents=True)
    os.replace(shards[0].resolve(), other / "blobs" / "digest0")
    shards[0].unlink()
    shards[0].symlink_to(other / "blobs" / "digest0")
    with pytest.raises(kvell.CheckpointError, match="is a link to"):
        kvell.from_pretrained(snapshot)


def test_a_tensor_that_two_shards_hold_alike_is_one(tmp_path: Path) -> None:
    """Some trainers let every rank write what all of them have. So it is in transformers."""
    folder = tmp_path / "saved"
    first, second, *_ = sharded(folder, tmp_path)
    name, tensor = next(iter(load_file(first).items()))
    save_file(load_file(second) | {name: tensor.clone()}, second, {"format": "pt"})
    model = kvell.from_pretrained(folder)
    theirs = LagunaForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(prompt()), logits_without_cache(theirs, prompt()), rtol=0, atol=1e-4)


@pytest.mark.parametrize("change", ["one bit", "dtype", "shape"])
def test_a_tensor_that_two_shards_hold_differently_is_refused(change: str, tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    first, second, *_ = sharded(folder, tmp_path)
    name, tensor = next(iter(load_file(first).items()))
    bits = tensor.clone().view(torch.int32)
    bits.view(-1)[-1] ^= 1
    other = {"one bit": bits.view(torch.float32), "dtype": tensor.double(), "shape": tensor[None].contiguous()}[
        change
    ]
    save_file(load_file(second) | {name: other}, second)
    with pytest.raises(kvell.CheckpointError, match=r"both hold .*, and not the same values"):
        kvell.from_pretrained(folder)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "base_model.model."])
def test_what_a_wrapper_put_before_all_names_is_refused_by_name(prefix: str, tmp_path: Path) -> None:
    folder = released("laguna", tmp_path)
    edit(folder, lambda tensors: [tensors.update({prefix + name: tensors.pop(name)}) for name in list(tensors)])
    with pytest.raises(kvell.CheckpointError, match=f"unexpected tensor {prefix}"):
        kvell.from_pretrained(folder)


def test_a_name_of_several_lines_or_none_that_fits_one_is_told_in_one(tmp_path: Path) -> None:
    folder = released("laguna", tmp_path)
    edit(folder, lambda tensors: tensors.update({"two\nlines\x00\x1b[31m": torch.ones(1)}))
    with pytest.raises(kvell.CheckpointError) as refusal:
        kvell.from_pretrained(folder)
    assert r"two lines\x00\x1b[31m" in str(refusal.value)
    edit(folder, lambda tensors: tensors.update({"a" * 10_000: tensors.pop("two\nlines\x00\x1b[31m")}))
    with pytest.raises(
        kvell.CheckpointError, match=r"unexpected tensor aaaa.* \.\.\. .*has no place for it$"
    ) as refusal:
        kvell.from_pretrained(folder)
    assert len(str(refusal.value)) < 3000


@pytest.mark.parametrize(
    ("key", "value", "wanted"),
    [("hc_mult", 1_000_000, "64"), ("hc_sinkhorn_iters", 30_000, "1,000")],
)
def test_counts_that_no_tensor_bears_out_are_bounded(key: str, value: int, wanted: str) -> None:
    flash = json.loads((resources.files("kvell.families") / "configs" / "deepseek-v4-flash.json").read_text())
    with pytest.raises(kvell.ConfigError, match=f"{key} is {value}, and Kvell builds no more than {wanted}"):
        parse_config(flash | {key: value})


def test_kvells_own_config_as_it_is_saved_may_lack_its_model_type(tmp_path: Path) -> None:
    config = kvell.from_pretrained(released("laguna", tmp_path / "laguna")).config
    model = kvell.Decoder(config.model_copy(update={"family": None}))
    model.save_pretrained(tmp_path / "own")
    values = json.loads((tmp_path / "own" / "config.json").read_text())
    assert values.pop("model_type") == "kvell"
    (tmp_path / "own" / "config.json").write_text(json.dumps(values))
    assert kvell.from_pretrained(tmp_path / "own").config == model.config


@pytest.mark.parametrize("name", ["generation_config.json", "model.safetensors"])
def test_a_folder_in_the_place_of_a_file_is_no_file_that_is_not_there(tmp_path: Path, name: str) -> None:
    folder = released("laguna", tmp_path)
    (folder / name).unlink(missing_ok=True)
    (folder / name).mkdir()
    with pytest.raises(kvell.CheckpointError, match=re.escape(name)):
        kvell.from_pretrained(folder)


# What a skip rule leaves out is told of, or a text's logits cannot depend on it.

REDUNDANT = {
    ("gemma4", "towers of other modalities"): {
        "model.vision_tower.encoder.layers.0.mlp.gate_proj.linear.weight": (4, 4),
        "model.audio_tower.layers.0.norm.weight": (4,),
        "embed_vision.embedding_projection.weight": (4, 4),
        "model.embed_audio.embedding_projection.weight": (4, 4),
    },
    ("gemma4", "keys and values of layers that share another's"): {
        "model.layers.5.self_attn.k_proj.weight": (32, 32),
        "model.layers.5.self_attn.v_proj.weight": (32, 32),
        "model.layers.5.self_attn.k_norm.weight": (16,),
    },
    ("laguna", "scales for a quantised cache"): {
        "model.layers.1.self_attn.k_scale": (1,),
        "model.layers.1.self_attn.v_scale": (1,),
    },
}


def test_every_rule_that_leaves_tensors_out_in_silence_is_compared_with_transformers_here() -> None:
    silent = {
        (family.name, rule)
        for family in FAMILIES.values()
        for rule in family.skip_rules
        if rule not in family.noticed_rules
    }
    assert silent == set(REDUNDANT)


@pytest.mark.parametrize(("family", "rule"), REDUNDANT)
@torch.no_grad()
def test_what_is_left_out_in_silence_changes_no_logits_in_transformers(
    family: str, rule: str, tmp_path: Path
) -> None:
    extra = {name: torch.randn(shape) for name, shape in REDUNDANT[family, rule].items()}
    if family == "gemma4":
        theirs, config, tensors = gemma4(GEMMA_CONFIG), GEMMA_CONFIG, gemma4_tensors
    else:
        theirs, config, tensors = laguna(LAGUNA_CONFIG), LAGUNA_CONFIG, laguna_tensors
    folder = write(tmp_path, config, tensors(theirs) | extra)
    wanted = logits_without_cache(AutoModelForCausalLM.from_pretrained(folder).eval(), prompt())
    torch.testing.assert_close(wanted, logits_without_cache(theirs, prompt()), rtol=0, atol=0)
    torch.testing.assert_close(kvell.from_pretrained(folder)(prompt()), wanted, rtol=0, atol=1e-4)
