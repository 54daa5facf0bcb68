"""DeepSeek V4's released files: every tensor's name, shape and value, how large a model and a context are, and what
is wrong with a file that does not fit."""

import json
import warnings
from collections import Counter
from collections.abc import Callable
from functools import cache
from importlib import resources
from math import ceil
from pathlib import Path
from typing import Any

import pytest
import torch
from number_formats import E2M1_VALUES, E4M3_VALUES
from oracle import (
    DEEPSEEK_V4,
    OFFICIAL_NAMES,
    OUR_NAMES,
    SPARSE,
    deepseek_v4,
    logits_without_cache,
    our_deepseek_v4_names,
    prompt,
    write,
)
from test_deepseek_v4_oracle import ReferenceDraft, no_near_ties, streams_of
from test_quantised import fp8, from_definition, scales_of
from torch import Tensor, nn
from transformers import DeepseekV4ForCausalLM

import kvell
from kvell.checkpoint.loading import build_empty, match
from kvell.checkpoint.quantised import QuantisedFiles
from kvell.families import parse_config
from kvell.families.deepseek_v4 import DRAFTER, FAMILY

F8, E8, I8, I64 = torch.float8_e4m3fn, torch.float8_e8m0fnu, torch.int8, torch.int64
BF16, F32 = torch.bfloat16, torch.float32
Stored = dict[str, tuple[torch.dtype, tuple[int, ...]]]


def stored(config: dict[str, Any]) -> Stored:
    """The tensors of a released checkpoint of this config, by name: dtype and shape."""
    hidden, streams = config["hidden_size"], config["hc_mult"]
    tensors: Stored = {}

    def in_fp8(name: str, rows: int, columns: int) -> None:
        tensors[f"{name}.weight"] = (F8, (rows, columns))
        tensors[f"{name}.scale"] = (E8, (ceil(rows / 128), ceil(columns / 128)))

    def in_fp4(name: str, rows: int, columns: int) -> None:
        tensors[f"{name}.weight"] = (I8, (rows, columns // 2))
        tensors[f"{name}.scale"] = (E8, (rows, ceil(columns / 32)))

    def in_bf16(name: str, *shape: int) -> None:
        tensors[f"{name}.weight"] = (BF16, shape)

    def connection(name: str, rows: int, scales: int) -> None:
        tensors[f"{name}_fn"] = (F32, (rows, streams * hidden))
        tensors[f"{name}_base"] = (F32, (rows,))
        tensors[f"{name}_scale"] = (F32, (scales,))

    def compressor(name: str, ratio: int, width: int, channels: int) -> None:
        in_bf16(f"{name}.wkv", channels, hidden)
        in_bf16(f"{name}.wgate", channels, hidden)
        tensors[f"{name}.ape"] = (F32, (ratio, channels))
        in_bf16(f"{name}.norm", width)

    def attention(name: str, ratio: int) -> None:
        heads, width = config["num_attention_heads"], config["head_dim"]
        rank, groups, group_rank = config["q_lora_rank"], config["o_groups"], config["o_lora_rank"]
        in_fp8(f"{name}.wq_a", rank, hidden)
        in_bf16(f"{name}.q_norm", rank)
        in_fp8(f"{name}.wq_b", heads * width, rank)
        in_fp8(f"{name}.wkv", width, hidden)
        in_bf16(f"{name}.kv_norm", width)
        in_fp8(f"{name}.wo_a", groups * group_rank, heads * width // groups)
        in_fp8(f"{name}.wo_b", hidden, groups * group_rank)
        tensors[f"{name}.attn_sink"] = (F32, (heads,))
        if ratio:
            compressor(f"{name}.compressor", ratio, width, 2 * width if ratio == 4 else width)
        if ratio == 4:
            own = config["index_head_dim"]
            in_fp8(f"{name}.indexer.wq_b", config["index_n_heads"] * own, rank)
            in_bf16(f"{name}.indexer.weights_proj", config["index_n_heads"], hidden)
            compressor(f"{name}.indexer.compressor", ratio, own, 2 * own)

    def experts(name: str, by_hash: bool) -> None:
        count, width = config["n_routed_experts"], config["moe_intermediate_size"]
        in_bf16(f"{name}.gate", count, hidden)
        if by_hash:
            tensors[f"{name}.gate.tid2eid"] = (I64, (config["vocab_size"], config["num_experts_per_tok"]))
        else:
            tensors[f"{name}.gate.bias"] = (F32, (count,))
        quantised = in_fp4 if config.get("expert_dtype") == "fp4" else in_fp8
        for expert in [f"experts.{number}" for number in range(count)] + ["shared_experts"]:
            form = in_fp8 if expert == "shared_experts" else quantised
            form(f"{name}.{expert}.w1", width, hidden)
            form(f"{name}.{expert}.w3", width, hidden)
            form(f"{name}.{expert}.w2", hidden, width)

    def layer(name: str, ratio: int, by_hash: bool) -> None:
        in_bf16(f"{name}.attn_norm", hidden)
        in_bf16(f"{name}.ffn_norm", hidden)
        connection(f"{name}.hc_attn", (2 + streams) * streams, 3)
        connection(f"{name}.hc_ffn", (2 + streams) * streams, 3)
        attention(f"{name}.attn", ratio)
        experts(f"{name}.ffn", by_hash)

    in_bf16("embed", config["vocab_size"], hidden)
    in_bf16("head", config["vocab_size"], hidden)
    in_bf16("norm", hidden)
    connection("hc_head", streams, 1)
    for index in range(config["num_hidden_layers"]):
        layer(f"layers.{index}", config["compress_ratios"][index], index < config["num_hash_layers"])
    for index in range(config["num_nextn_predict_layers"]):
        name = f"mtp.{index}"
        layer(name, 0, False)
        in_fp8(f"{name}.e_proj", hidden, hidden)
        in_fp8(f"{name}.h_proj", hidden, hidden)
        for norm in ("enorm", "hnorm", "norm"):
            in_bf16(f"{name}.{norm}", hidden)
        connection(f"{name}.hc_head", streams, 1)
    return tensors


def builtin(name: str) -> dict[str, Any]:
    """A released config.json."""
    return json.loads((resources.files("kvell.families") / "configs" / f"{name}.json").read_text())


def unpacked(dtype: torch.dtype, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of what is stored so: FP4 holds two numbers a byte."""
    return (shape[0], 2 * shape[1]) if dtype == I8 else shape


# Names and shapes


def test_the_names_and_shapes_generated_here_are_flashs() -> None:
    """Against literal ones of the released files."""
    tensors = stored(builtin("deepseek-v4-flash"))
    wanted = {
        "embed.weight": (BF16, (129280, 4096)),
        "head.weight": (BF16, (129280, 4096)),
        "norm.weight": (BF16, (4096,)),
        "hc_head_fn": (F32, (4, 16384)),
        "hc_head_base": (F32, (4,)),
        "hc_head_scale": (F32, (1,)),
        "layers.0.hc_attn_fn": (F32, (24, 16384)),
        "layers.42.hc_ffn_base": (F32, (24,)),
        "layers.42.hc_ffn_scale": (F32, (3,)),
        "layers.0.attn.wq_a.weight": (F8, (1024, 4096)),
        "layers.0.attn.wq_a.scale": (E8, (8, 32)),
        "layers.0.attn.wo_a.weight": (F8, (8192, 4096)),
        "layers.0.attn.attn_sink": (F32, (64,)),
        "layers.2.attn.compressor.wkv.weight": (BF16, (1024, 4096)),
        "layers.3.attn.compressor.wgate.weight": (BF16, (512, 4096)),
        "layers.2.attn.compressor.ape": (F32, (4, 1024)),
        "layers.3.attn.compressor.ape": (F32, (128, 512)),
        "layers.2.attn.indexer.wq_b.weight": (F8, (8192, 1024)),
        "layers.2.ffn.gate.tid2eid": (I64, (129280, 6)),
        "layers.3.ffn.gate.bias": (F32, (256,)),
        "layers.7.ffn.experts.255.w1.weight": (I8, (2048, 2048)),
        "layers.7.ffn.experts.255.w3.scale": (E8, (2048, 128)),
        "layers.7.ffn.experts.255.w2.weight": (I8, (4096, 1024)),
        "layers.7.ffn.experts.255.w2.scale": (E8, (4096, 64)),
        "layers.7.ffn.shared_experts.w1.weight": (F8, (2048, 4096)),
        "mtp.0.e_proj.weight": (F8, (4096, 4096)),
        "mtp.0.ffn.gate.bias": (F32, (256,)),
        "mtp.0.hc_head_fn": (F32, (4, 16384)),
    }
    assert {name: tensors.get(name) for name in wanted} == wanted
    assert "layers.0.attn.compressor.ape" not in tensors
    assert "layers.3.attn.indexer.wq_b.weight" not in tensors
    assert "layers.3.ffn.gate.tid2eid" not in tensors


def test_flash_has_69187_tensors() -> None:
    """2 window layers of 1565, 21 CSA layers of 1576, 20 HCA layers of 1569, a draft block of 1575 (a window layer's
    and ten of its own), and 6 outside: embedding, head, norm and three of the last collapse."""
    tensors = stored(builtin("deepseek-v4-flash"))
    by_owner = Counter(".".join(name.split(".")[:2]) if "." in name else name for name in tensors)
    layers = [by_owner[f"layers.{index}"] for index in range(43)]
    assert layers == [1565, 1565] + [1576, 1569] * 20 + [1576]
    assert by_owner["mtp.0"] == 1575
    assert len(tensors) == sum(layers) + 1575 + 6 == 69187


class NamesOnly:
    """A checkpoint's tensors without their bytes, in the place of TensorFiles."""

    def __init__(self, tensors: Stored) -> None:
        self.tensors = tensors

    def names(self) -> list[str]:
        return list(self.tensors)

    def get(self, name: str) -> Tensor:
        dtype, shape = self.tensors[name]
        return torch.empty(shape, dtype=dtype, device="meta")


@pytest.mark.parametrize("name", ["deepseek-v4-flash", "deepseek-v4-pro"])
def test_every_tensor_of_a_released_model_has_its_place(name: str) -> None:
    """Each fills a part of a parameter, of the same shape; together they fill all; and what is stored in fp32, as
    integers, or with scales is what stays so, and nothing else."""
    tensors = stored(builtin(name))
    files = QuantisedFiles(NamesOnly(tensors), FAMILY.scale_names)  # type: ignore[arg-type]
    assert sorted(files.scales.values()) == sorted(name for name, (dtype, _) in tensors.items() if dtype == E8)
    config = kvell.ModelConfig.from_pretrained(name)
    assert config.draft is not None
    sources, left_out = match(files, config, FAMILY)
    assert not left_out
    targets = dict(build_empty(config, BF16).named_tensors())
    assert sources.keys() == targets.keys()
    used = [theirs for placed in sources.values() for theirs in placed]
    assert sorted([*used, *files.scales.values()]) == sorted(tensors)
    for ours, placed in sources.items():
        target, filled = targets[ours], 0
        for theirs, place in placed.items():
            dtype, shape = tensors[theirs]
            part = place.of(target)
            assert part.shape == unpacked(dtype, shape), theirs
            assert part.dtype == (dtype if dtype in (F32, I64) else BF16), theirs
            filled += part.numel()
        assert filled == target.numel(), ours


def parameters(tensors: Stored) -> int:
    """Numbers that were learnt: neither scales nor tables of experts."""
    return sum(
        torch.Size(unpacked(dtype, shape)).numel() for dtype, shape in tensors.values() if dtype not in (E8, I64)
    )


@pytest.mark.parametrize(
    ("name", "with_draft", "published", "within"),
    [
        pytest.param("deepseek-v4-flash", False, 284e9, 0.01, id="Flash without its draft block, 284.3 G"),
        pytest.param("deepseek-v4-flash", True, 284e9, 0.03, id="Flash with its draft block, 290.9 G"),
        pytest.param("deepseek-v4-pro", False, 1.6e12, 0.02, id="Pro without its draft block, 1.573 T"),
        pytest.param("deepseek-v4-pro", True, 1.6e12, 0.01, id="Pro with its draft block, 1.599 T"),
    ],
)
def test_parameters_are_as_many_as_published(name: str, with_draft: bool, published: float, within: float) -> None:
    config = kvell.ModelConfig.from_pretrained(name)
    if not with_draft:
        config = config.model_copy(update={"draft": None})
    count = build_empty(config, BF16).num_parameters()
    tensors = stored(builtin(name) | ({} if with_draft else {"num_nextn_predict_layers": 0}))
    assert count == parameters(tensors)
    assert abs(count / published - 1) < within


MIB = 2**20


def allocated(tokens: int) -> dict[str, int]:
    """Bytes reserved by a real cache of Flash's, by what they are for."""
    config = kvell.ModelConfig.from_pretrained("deepseek-v4-flash")
    cache = kvell.Cache(config.streams(), dtype=BF16, max_length=tokens)
    held: Counter[str] = Counter()
    for (layer, name), stream in cache.sequences[0].streams.items():
        compressor = config.layers[layer].attention.compressor
        kind = f"{name} 1:{compressor.ratio}" if name == "entry" and compressor else name
        held[kind] += stream.allocated_nbytes
    assert sum(held.values()) == cache.allocated_nbytes
    return dict(held)


def test_a_context_of_65536_tokens_takes_the_published_bytes() -> None:
    """Entries by the released shapes in bf16: 21 layers of 16,384 x 512, 20 of 512 x 512, 21 of 16,384 x 128. Windows
    and raw rows are of fixed size: 43 x 127 x 512; 21 x 7 and 20 x 127 rows of 4 and 2 x 512; 21 x 7 of 4 x 128."""
    short, long = allocated(65536), allocated(131072)
    assert short["entry 1:4"] == 336 * MIB
    assert short["entry 1:128"] == 10 * MIB
    assert short["index"] == 84 * MIB
    fixed = {
        "window": 43 * 127 * 512 * 2,
        "entry_raw": (21 * 7 * 4 + 20 * 127 * 2) * 512 * 2,
        "index_raw": 21 * 7 * 4 * 128 * 2,
    }
    for name, nbytes in fixed.items():
        assert short[name] == long[name] == nbytes, name
    assert {name: long[name] for name in short if name not in fixed} == {
        name: 2 * nbytes for name, nbytes in short.items() if name not in fixed
    }


# Values: a small checkpoint in the official layout. Rows and columns are no multiples of 128: blocks at the edges are
# partial, and no two sides of a matrix are alike.

TINY = DEEPSEEK_V4 | {
    "hidden_size": 160,
    "num_hidden_layers": 3,
    "compress_ratios": [0, 4, 128, 0],
    "num_hash_layers": 1,
    "num_nextn_predict_layers": 1,
    "head_dim": 48,
    "qk_rope_head_dim": 16,
    "q_lora_rank": 136,
    "o_lora_rank": 72,
    "index_head_dim": 32,
    "moe_intermediate_size": 96,
    "swiglu_limit": 10.0,
    "expert_dtype": "fp4",
    "quantization_config": {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "scale_fmt": "ue8m0",
        "weight_block_size": [128, 128],
        "activation_scheme": "dynamic",
    },
    "torch_dtype": "bfloat16",
}
# The -Base releases have no expert_dtype: their experts are in FP8.
FORMS = {"experts in FP4": TINY, "experts in FP8": {k: v for k, v in TINY.items() if k != "expert_dtype"}}
each_form = pytest.mark.parametrize("form", FORMS)


def drawn(form: str = "experts in FP4") -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A checkpoint of random values as it is stored, and what each of its weights stands for, in float64."""
    files, values = _drawn(form)
    return dict(files), dict(values)


@cache
def _drawn(form: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    files: dict[str, Tensor] = {}
    values: dict[str, Tensor] = {}

    def integers(low: int, high: int, shape: tuple[int, ...]) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    def normal(shape: tuple[int, ...], deviation: float) -> Tensor:
        return torch.randn(shape, generator=generator) * deviation

    tensors = stored(FORMS[form])
    for name, (dtype, shape) in tensors.items():
        scale = name.replace(".weight", ".scale")
        if dtype == F8:  # codes up to 2.0; with the scales the deviation is about 160^-0.5
            codes = integers(0, 0x41, shape) + 0x80 * integers(0, 2, shape)
            grid = integers(123, 126, tensors[scale][1])
            files |= {name: fp8(codes), scale: scales_of(grid)}
            values[name] = from_definition(E4M3_VALUES, codes, grid, (128, 128))
        elif dtype == I8:
            codes = integers(0, 16, unpacked(dtype, shape))
            grid = integers(121, 124, tensors[scale][1])
            packed = codes[:, ::2] + 16 * codes[:, 1::2]  # the low nibble comes first
            files |= {name: packed.to(torch.uint8).view(I8), scale: scales_of(grid)}
            values[name] = from_definition(E2M1_VALUES, codes, grid, (1, 32))
        elif dtype == I64:
            files[name] = torch.rand(shape[0], 4, generator=generator).argsort(1)[:, : shape[1]]
            values[name] = files[name]
        elif dtype != E8:
            size = {"embed.weight": 0.4, "head.weight": 0.7}.get(name, 1.0)
            if name.endswith(("norm.weight", "_scale")):
                tensor = (3.0 if name == "norm.weight" else 1.0) * (
                    0.6 + 0.8 * torch.rand(shape, generator=generator)
                )
            elif name.endswith(("attn_sink", "ape", "bias", "_base")):
                tensor = normal(shape, 0.5)
            else:
                tensor = normal(shape, size * shape[-1] ** -0.5)
            files[name] = tensor.to(dtype)
            values[name] = files[name].double()
    assert files.keys() == tensors.keys()
    return files, values


def set_layer(layer: nn.Module, values: dict[str, Tensor], prefix: str) -> None:
    """Gives a layer of transformers' the values that stand under the official names."""
    state: dict[str, Tensor] = {}
    for name, tensor in layer.state_dict().items():
        if name.startswith("mlp.experts."):
            experts = [f"{prefix}ffn.experts.{expert}" for expert in range(len(tensor))]
            if name.endswith("down_proj"):
                state[name] = torch.stack([values[f"{expert}.w2.weight"] for expert in experts])
            else:
                both = [torch.cat([values[f"{expert}.{part}.weight"] for part in ("w1", "w3")]) for expert in experts]
                state[name] = torch.stack(both)
        else:
            state[name] = values[prefix + OFFICIAL_NAMES[name]]
    layer.load_state_dict(state)


def of_transformers(
    config: dict[str, Any], values: dict[str, Tensor]
) -> tuple[DeepseekV4ForCausalLM, ReferenceDraft]:
    """transformers' model with these values, and the draft block put together from its modules."""
    settings = {name: value for name, value in config.items() if name not in ("quantization_config", "expert_dtype")}
    model = deepseek_v4(settings)
    draft = ReferenceDraft(model, settings)
    with torch.no_grad():
        for owner, prefix in ((model.model, ""), (draft, "mtp.0.")):
            owner.norm.weight.copy_(values[f"{prefix}norm.weight"])
            for part in ("fn", "base", "scale"):
                getattr(owner.hc_head, f"hc_{part}").copy_(values[f"{prefix}hc_head_{part}"])
        model.model.embed_tokens.weight.copy_(values["embed.weight"])
        model.lm_head.weight.copy_(values["head.weight"])
        for name in ("enorm", "hnorm", "e_proj", "h_proj"):
            getattr(draft, name).weight.copy_(values[f"mtp.0.{name}.weight"])
    for index, layer in enumerate(model.model.layers):
        set_layer(layer, values, f"layers.{index}.")
    set_layer(draft.layer, values, "mtp.0.")
    return model, draft


def values_by_our_names(config: dict[str, Any], values: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same under Kvell's names, in fp32, which holds them all exactly."""
    for name, value in values.items():
        assert torch.equal(value.float().double(), value.double()), name
    model, draft = of_transformers(config, values)
    state = model.state_dict()
    ours = {name: state[theirs] for name, theirs in our_deepseek_v4_names(model).items()}
    ours |= {f"draft_block.layer.{OUR_NAMES[name]}": tensor for name, tensor in draft.layer.state_dict().items()}
    for name, theirs in (
        ("embedding_norm.weight", draft.enorm.weight),
        ("residual_norm.weight", draft.hnorm.weight),
        ("embedding_proj.weight", draft.e_proj.weight),
        ("residual_proj.weight", draft.h_proj.weight),
        ("norm.weight", draft.norm.weight),
        ("ends.weight", draft.hc_head.hc_fn),
        ("ends.base", draft.hc_head.hc_base),
        ("ends.scale", draft.hc_head.hc_scale),
    ):
        ours[f"draft_block.{name}"] = theirs.detach()
    return ours


FP32_ALWAYS = (
    ".sink",
    ".position_bias",
    ".selection_bias",
    "connection.weight",
    "connection.base",
    "connection.scale",
)


@each_form
@pytest.mark.parametrize("dtype", [None, F32, BF16])
def test_a_checkpoint_in_the_official_layout_is_read_exactly(
    form: str, dtype: torch.dtype | None, tmp_path: Path
) -> None:
    """All products of codes and scales fit both dtypes, and what is stored in BF16 fits fp32: no value is rounded.
    Without a dtype the embedding's is taken."""
    files, values = drawn(form)
    model = kvell.from_pretrained(write(tmp_path, FORMS[form], files), dtype=dtype)
    assert model.dtype == (dtype or BF16)
    ours, wanted = dict(model.named_tensors()), values_by_our_names(FORMS[form], values)
    assert ours.keys() == wanted.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor.float(), wanted[name].float()), name
        if name.endswith(FP32_ALWAYS) or ".ends." in f".{name}":
            assert tensor.dtype == F32, name
        elif name.endswith("router.table"):
            assert tensor.dtype == I64
        else:
            assert tensor.dtype == model.dtype, name


@each_form
@torch.no_grad()
def test_a_checkpoint_in_the_official_layout_says_what_transformers_says_with_its_values(
    form: str, tmp_path: Path
) -> None:
    files, values = drawn(form)
    model = kvell.from_pretrained(write(tmp_path, FORMS[form], files), dtype=F32)
    theirs, draft = of_transformers(FORMS[form], values)
    tokens = prompt(140)
    with no_near_ties(theirs):
        wanted = logits_without_cache(theirs, tokens)
    assert 1 < wanted.abs().max() < 15
    logits, streams = model(tokens, return_streams=True)
    torch.testing.assert_close(logits, wanted, rtol=0, atol=1e-4)
    drafts, _ = model.draft(streams[:, :-1], tokens[:, 1:])
    wanted_drafts, _ = draft(streams_of(theirs, tokens)[:, :-1], tokens[:, 1:])
    torch.testing.assert_close(drafts, wanted_drafts, rtol=0, atol=1e-4)


@torch.no_grad()
def test_a_quantised_model_is_saved_under_names_that_transformers_reads(tmp_path: Path) -> None:
    files, values = drawn()
    kvell.from_pretrained(write(tmp_path / "official", TINY, files), dtype=F32).save_pretrained(tmp_path / "saved")
    again, report = DeepseekV4ForCausalLM.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    theirs, _ = of_transformers(TINY, values)
    tokens = prompt(20)
    torch.testing.assert_close(
        logits_without_cache(again.eval(), tokens), logits_without_cache(theirs, tokens), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("unprefixed", [(), ("head.", "mtp."), ("hc_head_", "norm.", "embed.")])
def test_the_official_names_are_read_behind_model_too(unprefixed: tuple[str, ...], tmp_path: Path) -> None:
    """As trainers write them, whose decoder is the `model` of something larger; not always all of them."""
    files, _ = drawn()
    behind = {name if name.startswith(unprefixed) else f"model.{name}": tensor for name, tensor in files.items()}
    model, told = loaded_with_warnings(write(tmp_path / "behind", TINY, behind))
    wanted = kvell.from_pretrained(write(tmp_path / "official", TINY, files), dtype=F32)
    assert not told
    assert model.config == wanted.config
    tensors = dict(wanted.named_tensors())
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in model.named_tensors())


def test_a_name_behind_model_and_without_it_is_the_same_tensor_twice(tmp_path: Path) -> None:
    files, _ = drawn()
    files["model.hc_head_fn"] = files["hc_head_fn"].clone()
    assert "are the same tensor, spelled in two ways" in refused(write(tmp_path, TINY, files))


@pytest.mark.parametrize("scale_name", ["scale", "weight_scale_inv"])
@each_form
def test_scales_in_fp32_are_any_positive_numbers(form: str, scale_name: str, tmp_path: Path) -> None:
    """value = code * scale: the same model where they are the powers of two that were stored, three times its numbers
    where they are three times as large. What is called inverse is multiplied as well."""
    files, values = drawn(form)
    scales = {name: tensor.float() for name, tensor in files.items() if tensor.dtype == E8}
    plain = {name: tensor for name, tensor in files.items() if name not in scales}
    for factor in (1.0, 3.0):
        renamed = {name.removesuffix("scale") + scale_name: scale * factor for name, scale in scales.items()}
        model = kvell.from_pretrained(write(tmp_path / str(factor), FORMS[form], plain | renamed), dtype="float64")
        scaled = {
            name: value * factor if name.replace(".weight", ".scale") in scales else value
            for name, value in values.items()
        }
        wanted = values_by_our_names(FORMS[form], scaled)
        for name, tensor in model.named_tensors():
            assert torch.equal(tensor.double(), wanted[name].double()), name


def test_transformers_names_have_scales_too(tmp_path: Path) -> None:
    """transformers' own FP8 files: its names, `weight_scale_inv` beside them."""
    theirs = deepseek_v4(DEEPSEEK_V4)
    name = "model.layers.1.self_attn.q_b_proj.weight"
    tensors = theirs.state_dict()
    codes = torch.randint(0, 0x7F, tuple(tensors[name].shape))
    scale = torch.tensor([[0.7]])
    quantised = tensors | {name: fp8(codes), f"{name}_scale_inv": scale}
    model = kvell.from_pretrained(write(tmp_path, DEEPSEEK_V4, quantised), dtype="float64")
    wanted = torch.tensor([float(E4M3_VALUES[code] or 0) for code in codes.flatten().tolist()], dtype=torch.float64)
    loaded = model.layers[1].attention.q_b_proj.weight
    assert torch.equal(loaded.flatten(), wanted * scale.double().item())


# Other drafters


def loaded_with_warnings(folder: Path) -> tuple[kvell.Decoder, list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = kvell.from_pretrained(folder, dtype=F32)
    return model, [str(one.message) for one in caught]


@pytest.mark.parametrize("announced", [0, 1, 3])
def test_a_drafter_of_another_kind_is_left_out_with_one_warning(announced: int, tmp_path: Path) -> None:
    """Flash-0731 replaces the draft block by DSpark's, mtp.0 to mtp.2, and compress_ratios has three entries more
    than there are layers. Some of the names are those of multi-token prediction."""
    files, _ = drawn()
    config = TINY | {"compress_ratios": [0, 4, 128, 0, 0, 0], "num_nextn_predict_layers": announced}
    block = {name: tensor for name, tensor in files.items() if name.startswith("mtp.0.")}
    for index in (1, 2):
        files |= {name.replace("mtp.0.", f"mtp.{index}."): tensor.clone() for name, tensor in block.items()}
    files |= {"mtp.2.confidence.weight": torch.ones(3, 5), "mtp.0.markov.scale": scales_of(torch.ones(1, 1))}
    left_out = sum(name.startswith("mtp.") for name in files)
    model, told = loaded_with_warnings(write(tmp_path / "dspark", config, files))
    assert model.config.draft is None
    (warning,) = told
    assert f"{left_out} by the rule {DRAFTER!r}" in warning
    plain = {name: tensor for name, tensor in files.items() if not name.startswith("mtp.")}
    other, told = loaded_with_warnings(write(tmp_path / "without", config, plain))
    assert not told
    with torch.no_grad():
        assert torch.equal(model(prompt(9)), other(prompt(9)))


def test_a_draft_block_that_is_read_needs_no_warning(tmp_path: Path) -> None:
    model, told = loaded_with_warnings(write(tmp_path, TINY, drawn()[0]))
    assert not told
    assert model.draft_block is not None


@pytest.mark.parametrize("missing", ["mtp.0.e_proj.weight", "mtp.0.ffn.experts.3.w3.weight", "mtp.0.hc_head_fn"])
def test_half_a_draft_block_is_refused(missing: str, tmp_path: Path) -> None:
    files, _ = drawn()
    del files[missing]
    files.pop(missing.replace(".weight", ".scale"), None)
    assert "mtp.0." in refused(write(tmp_path, TINY, files))


# What does not fit


def refused(folder: Path) -> str:
    """The one line that a file is refused with."""
    with pytest.raises((kvell.CheckpointError, kvell.ConfigError)) as refusal:
        kvell.from_pretrained(folder)
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


def with_byte(tensor: Tensor, index: tuple[int, int], byte: int) -> Tensor:
    changed = tensor.clone()
    changed.view(torch.uint8)[index] = byte
    return changed


def with_expert(table: Tensor, index: tuple[int, int], expert: int) -> Tensor:
    changed = table.clone()
    changed[index] = expert
    return changed


WKV, EXPERT, TABLE = "layers.1.attn.wkv", "layers.2.ffn.experts.3.w2", "layers.0.ffn.gate.tid2eid"
Files = dict[str, Tensor]
MISFITS: dict[str, tuple[Callable[[Files], object], list[str]]] = {
    "FP8 scales too few": (
        lambda t: t.update({f"{WKV}.scale": t[f"{WKV}.scale"][:, :1]}),
        [f"{WKV}.weight", "[48, 160]", "[1, 1]", "[1, 2]"],
    ),
    "FP8 scales for other blocks": (
        lambda t: t.update({f"{WKV}.scale": scales_of(torch.full((1, 5), 127))}),
        [f"{WKV}.weight", "[1, 5]", "[1, 2]"],
    ),
    "FP4 scales for blocks of 128": (
        lambda t: t.update({f"{EXPERT}.scale": scales_of(torch.full((2, 1), 127))}),
        [f"{EXPERT}.weight", "[160, 96]", "[2, 1]", "[160, 3]"],
    ),
    "FP4 scales of another matrix": (
        lambda t: t.update({f"{EXPERT}.scale": t["layers.2.ffn.experts.3.w1.scale"].clone()}),
        [f"{EXPERT}.weight", "[96, 5]", "[160, 3]"],
    ),
    "an FP8 scale that is NaN": (
        lambda t: t.update({f"{WKV}.scale": with_byte(t[f"{WKV}.scale"], (0, 1), 255)}),
        [f"{WKV}.weight", "scale", "NaN", "255"],
    ),
    "an FP4 scale that is NaN": (
        lambda t: t.update({f"{EXPERT}.scale": with_byte(t[f"{EXPERT}.scale"], (159, 2), 255)}),
        [f"{EXPERT}.weight", "scale", "NaN", "255"],
    ),
    "no scales at all": (
        lambda t: [t.pop(name) for name in list(t) if name.endswith(".scale")],
        [".weight", ".scale", "missing"],
    ),
    "one weight without scales": (lambda t: t.pop(f"{WKV}.scale"), [f"{WKV}.weight", f"{WKV}.scale", "missing"]),
    "scales without a weight": (lambda t: t.pop(f"{WKV}.weight"), [f"{WKV}.scale"]),
    "an expert that is missing": (
        lambda t: [t.pop(f"{EXPERT}.{part}") for part in ("weight", "scale")],
        ["missing", "experts.3.w2.weight"],
    ),
    "an expert too many": (
        lambda t: t.update({"layers.2.ffn.experts.4.w2.weight": torch.ones(160, 96)}),
        ["layers.2.ffn.experts.4.w2.weight"],
    ),
    "a table that names an expert too many": (
        lambda t: t.update({TABLE: with_expert(t[TABLE], (96, 1), 4)}),
        [TABLE, "expert 4", "there are 4"],
    ),
    "a table that names an expert below zero": (
        lambda t: t.update({TABLE: with_expert(t[TABLE], (0, 0), -1)}),
        [TABLE, "expert -1"],
    ),
    "a table that is not of integers": (
        lambda t: t.update({TABLE: t[TABLE].float()}),
        [TABLE, "torch.float32", "integers"],
    ),
    "a table for more experts a token": (
        lambda t: t.update({TABLE: torch.zeros(97, 3, dtype=I64)}),
        [TABLE, "[97, 3]", "[97, 2]"],
    ),
    "a table for another vocabulary": (
        lambda t: t.update({TABLE: torch.zeros(96, 2, dtype=I64)}),
        [TABLE, "[96, 2]", "[97, 2]"],
    ),
    "a table where routing is learnt": (
        lambda t: t.update({"layers.1.ffn.gate.tid2eid": t[TABLE].clone()}),
        ["layers.1.ffn.gate.tid2eid"],
    ),
    "an indexer where nothing is picked": (
        lambda t: t.update({"layers.2.attn.indexer.weights_proj.weight": torch.ones(16, 160)}),
        ["layers.2.attn.indexer.weights_proj.weight"],
    ),
    "a position bias for another ratio": (
        lambda t: t.update({"layers.2.attn.compressor.ape": torch.zeros(64, 48)}),
        ["layers.2.attn.compressor.ape", "[64, 48]", "[128, 48]"],
    ),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_a_tensor_that_does_not_fit_is_named_in_one_line(misfit: str, tmp_path: Path) -> None:
    change, words = MISFITS[misfit]
    files, _ = drawn()
    change(files)
    message = refused(write(tmp_path, TINY, files))
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"compress_ratios": [0, 4]}, ["compress_ratios", "2 entries", "3 layers"]),
        ({"compress_ratios": []}, ["compress_ratios", "0 entries", "3 layers"]),
        ({"compress_ratios": 4}, ["compress_ratios", "4"]),
        ({"compress_ratios": [0, 16, 128, 0]}, ["compress_ratios", "16", "0, 4, 128"]),
        ({"compress_ratios": [0, "4", 128, 0]}, ["compress_ratios", "'4'"]),
        ({"layer_types": ["full_attention"] * 3}, ["layer_types", "full_attention", SPARSE]),
        ({"layer_types": [SPARSE] * 2}, ["layer_types", "2 entries", "3 layers"]),
        ({"mlp_layer_types": ["moe", "dense", "moe"]}, ["mlp_layer_types", "dense"]),
        ({"scoring_func": "softmax"}, ["scoring_func", "softmax", "sqrtsoftplus"]),
        ({"num_hash_layers": -1}, ["num_hash_layers", "-1"]),
        ({"norm_topk_prob": False}, ["norm_topk_prob is false"]),
        ({"num_key_value_heads": 4}, ["num_key_value_heads", "4"]),
        ({"o_groups": 3}, ["o_groups 3", "num_attention_heads 4"]),
        ({"qk_rope_head_dim": 64}, ["qk_rope_head_dim 64", "head_dim 48"]),
        ({"rope_scaling": {"type": "longrope", "factor": 4}}, ["rope", "longrope"]),
        ({"rope_scaling": {"type": "yarn", "factor": 4}}, ["original_max_position_embeddings", "missing"]),
    ],
)
def test_a_config_that_does_not_fit_is_refused_in_one_line_that_names_the_field(
    fields: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(kvell.ConfigError) as refusal:
        parse_config(TINY | fields)
    message = str(refusal.value)
    assert "\n" not in message
    for word in ["deepseek_v4 config", *words]:
        assert word in message


def test_older_fields_for_the_rates_are_read() -> None:
    values = {**DEEPSEEK_V4, "compress_ratios": [0, 4, 128, 4, 0], "compress_rate_csa": 3, "compress_rate_hca": 9}
    values = {name: value for name, value in values.items() if name not in ("layer_types", "compress_rates")}
    compressors = [layer.attention.compressor for layer in parse_config(values).layers]
    assert [one.ratio for one in compressors if one is not None] == [3, 9, 3]


def test_a_rate_of_an_unknown_layer_type_is_refused() -> None:
    values = {**DEEPSEEK_V4, "compress_rates": {"lightly_compressed_attention": 2}}
    with pytest.raises(kvell.ConfigError, match=r"compress_rates\.lightly_compressed_attention .*unknown"):
        parse_config(values)
