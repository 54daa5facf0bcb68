"""Weights in FP8 and FP4: every code and scale as the formats define them, in a checkpoint's place, and what is wrong
with one is named."""

import json
import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from number_formats import E2M1_VALUES, E4M3_VALUES, rounded
from oracle import FULL, LAGUNA, SLIDING, laguna, laguna_tensors, prompt, write
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import kvell
from kvell.checkpoint.quantised import dequantise
from kvell.families import FAMILIES
from kvell.families import laguna as laguna_family
from kvell.layers.norms import RMSNorm

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SCALE_BYTES = [0, 1, 100, 126, 127, 128, 140, 253, 254]
every_dtype = pytest.mark.parametrize("dtype", DTYPES)
every_scale = pytest.mark.parametrize("byte", SCALE_BYTES)


def fp8(codes: Tensor) -> Tensor:
    return codes.to(torch.uint8).view(torch.float8_e4m3fn)


def scales_of(codes: Tensor) -> Tensor:
    return codes.to(torch.uint8).view(torch.float8_e8m0fnu)


def products(values: list[Fraction | None], byte: int, dtype: torch.dtype) -> list[float]:
    """Every code's value times a scale byte's, as the dtype has it; NaN for a code that is no number."""
    scale, negative = Fraction(2) ** (byte - 127), len(values) // 2  # the sign is the first bit, of zeros too
    return [
        math.nan if value is None else math.copysign(rounded(value * scale, dtype), -1 if code >= negative else 1)
        for code, value in enumerate(values)
    ]


def same(ours: Tensor, wanted: Tensor) -> bool:
    """Equal to the bit: zeros have signs."""
    return torch.equal(ours, wanted) and torch.equal(ours.signbit(), wanted.signbit())


@every_dtype
@every_scale
def test_every_fp8_code_is_its_value_times_the_scale(byte: int, dtype: torch.dtype) -> None:
    values = products(E4M3_VALUES, byte, dtype)
    codes = [code for code in range(256) if math.isfinite(values[code])]
    assert len(codes) > (1 if dtype == torch.float16 else 100)
    wanted = torch.tensor([[values[code] for code in codes]], dtype=torch.float64)
    # In one row, over several blocks, all of the same scale.
    scales = scales_of(torch.full((1, -(-len(codes) // 128)), byte))
    ours = dequantise("w", fp8(torch.tensor([codes])), scales, dtype)
    assert ours.dtype == dtype
    assert same(ours.double(), wanted)


# Ordinary ones; in the middle of two numbers of bf16 and of fp16 once a code is multiplied, or a last bit beside it;
# the largest; and what makes products subnormal in fp32.
FP32_SCALES = [0.1, 1 / 3, 257 / 256, 2049 / 2048, (257 + 2**-15) / 256, 3.4e38, 1.1e-38, 1e-44, 2.0**-149]


@every_dtype
@pytest.mark.parametrize("scale", FP32_SCALES)
def test_a_code_times_any_fp32_scale_is_rounded_once(scale: float, dtype: torch.dtype) -> None:
    scales = torch.tensor([[scale]])
    exact = Fraction(scales.item())
    for code, value in enumerate(E4M3_VALUES):
        wanted = math.nan if value is None else rounded(value * exact, dtype)
        codes = fp8(torch.tensor([[code]]))
        if math.isfinite(wanted):
            assert dequantise("w", codes, scales, dtype).item() == wanted
        else:
            with pytest.raises(kvell.CheckpointError, match=r"^w: (a code is NaN|a value times its scale)"):
                dequantise("w", codes, scales, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_by_way_of_fp32_would_round_twice(dtype: torch.dtype) -> None:
    """A product that lies a little above the middle of two numbers, by less than fp32 can say."""
    bits = {torch.bfloat16: 8, torch.float16: 11}[dtype]
    middle = 1 + Fraction(1, 2**bits)
    scale = torch.tensor(float(middle) * 2 / 3).nextafter(torch.tensor(9.0))
    product = Fraction(scale.item()) * Fraction(3, 2)
    assert 0 < product - middle < Fraction(1, 2**23)
    code = E4M3_VALUES.index(Fraction(3, 2))
    ours = dequantise("w", fp8(torch.tensor([[code]])), scale.view(1, 1), dtype)
    assert ours.item() == rounded(product, dtype) == float(1 + Fraction(2, 2**bits))


@every_dtype
@every_scale
def test_an_fp8_code_that_is_nan_or_too_large_is_refused(byte: int, dtype: torch.dtype) -> None:
    for code, scaled in enumerate(products(E4M3_VALUES, byte, dtype)):
        if not math.isfinite(scaled):
            codes = torch.zeros(3, 130, dtype=torch.uint8)
            codes[2, 129] = code
            words = "a code is NaN" if math.isnan(scaled) else f"too large for {dtype}"
            with pytest.raises(kvell.CheckpointError, match=f"some.weight: .*{words}"):
                dequantise("some.weight", fp8(codes), scales_of(torch.full((1, 2), byte)), dtype)


@pytest.mark.parametrize("stored", [torch.int8, torch.uint8])
@every_dtype
@every_scale
def test_every_pair_of_fp4_codes_is_its_values_times_the_scale(
    byte: int, dtype: torch.dtype, stored: torch.dtype
) -> None:
    values = products(E2M1_VALUES, byte, dtype)
    usable = [code for code in range(16) if math.isfinite(values[code])]
    pairs = [(low, high) for low in usable for high in usable]
    codes = [code for pair in pairs for code in pair]
    wanted = torch.tensor([[values[code] for code in codes]], dtype=torch.float64)
    packed = torch.tensor([[low + 16 * high for low, high in pairs]], dtype=torch.uint8).view(stored)
    scales = scales_of(torch.full((1, -(-len(codes) // 32)), byte))
    ours = dequantise("w", packed, scales, dtype)
    assert ours.dtype == dtype
    assert same(ours.double(), wanted)
    for code in set(range(16)) - set(usable):
        bad = torch.full((1, 16), code, dtype=torch.uint8).view(stored)
        with pytest.raises(kvell.CheckpointError, match=f"some.weight: .*too large for {dtype}"):
            dequantise("some.weight", bad, scales_of(torch.full((1, 1), byte)), dtype)


def test_the_low_nibble_comes_first() -> None:
    packed = torch.tensor([[0x21, 0x7F, 0xA0] + [0] * 13], dtype=torch.uint8)
    values = dequantise("w", packed, scales_of(torch.tensor([[128]])), torch.float32)
    assert values[0, :6].tolist() == [1.0, 2.0, -12.0, 12.0, 0.0, -2.0]


def from_definition(values: list[Fraction | None], codes: Tensor, scales: Tensor, block: tuple[int, int]) -> Tensor:
    """(N, K) of codes and a grid of scale bytes -> fp64: each element has the scale of the block it lies in."""
    rows, columns = torch.arange(codes.shape[0]) // block[0], torch.arange(codes.shape[1]) // block[1]
    numbers = torch.tensor(products(values, 127, torch.float64), dtype=torch.float64)
    powers = torch.tensor([2.0 ** (byte - 127) for byte in range(255)], dtype=torch.float64)
    return numbers[codes.long()] * powers[scales.long()[rows][:, columns]]


@every_dtype
@pytest.mark.parametrize("shape", [(1, 1), (128, 128), (127, 129), (129, 127), (300, 200), (128, 384), (256, 1)])
def test_fp8_scales_are_for_blocks_of_128_rows_and_columns_partial_at_the_edges(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    codes = torch.randint(0, 0x7F, shape) + 0x80 * torch.randint(0, 2, shape)
    grid = torch.randint(118, 133, (-(-shape[0] // 128), -(-shape[1] // 128)))
    wanted = from_definition(E4M3_VALUES, codes, grid, (128, 128))
    assert same(dequantise("w", fp8(codes), scales_of(grid), dtype), wanted.to(torch.float32).to(dtype))


@every_dtype
@pytest.mark.parametrize("shape", [(1, 32), (3, 64), (129, 96), (300, 32), (2, 48), (5, 2)])
def test_fp4_scales_are_for_32_of_a_row(shape: tuple[int, int], dtype: torch.dtype) -> None:
    codes = torch.randint(0, 16, shape)
    grid = torch.randint(118, 135, (shape[0], -(-shape[1] // 32)))
    packed = (codes[:, ::2] + 16 * codes[:, 1::2]).to(torch.uint8).view(torch.int8)
    wanted = from_definition(E2M1_VALUES, codes, grid, (1, 32))
    assert same(dequantise("w", packed, scales_of(grid), dtype), wanted.to(torch.float32).to(dtype))


@pytest.mark.parametrize("kind", ["fp8", "fp4"])
def test_a_large_weight_is_unpacked_piece_by_piece(kind: str) -> None:
    made: list[int] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **(kwargs or {}))
            if isinstance(result, Tensor):
                made.append(result.untyped_storage().nbytes())
            return result

    zeros = torch.zeros(4096, 256, dtype=torch.uint8)
    codes, grid = (fp8(zeros), (32, 2)) if kind == "fp8" else (zeros[:, :128], (4096, 8))
    with Watch():
        values = dequantise("w", codes, scales_of(torch.full(grid, 127)), torch.bfloat16)
    assert max(made) == values.nbytes
    assert sum(nbytes > values.nbytes // 4 for nbytes in made if nbytes not in (values.nbytes, zeros.nbytes)) == 0


# A checkpoint: Laguna's, with queries in FP8 (160 x 160: four blocks, three of them partial) and experts in FP4.

CONFIG = LAGUNA | {
    "hidden_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 10,
    "num_attention_heads_per_layer": [10, 10],
    "layer_types": [FULL, SLIDING],
    "mlp_layer_types": ["dense", "sparse"],
    "num_experts": 4,
    "moe_intermediate_size": 64,
    "rope_parameters": {
        FULL: {"rope_type": "default", "rope_theta": 500000.0, "partial_rotary_factor": 0.5},
        SLIDING: {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0},
    },
}
QUERY, EXPERT = "model.layers.1.self_attn.q_proj.weight", "model.layers.1.mlp.experts.2.down_proj.weight"
QUERY_SCALE, EXPERT_SCALE = QUERY.replace(".weight", ".scale"), EXPERT.replace(".weight", ".scale")
NORM, BIAS = "model.norm.weight", "model.layers.1.mlp.experts.e_score_correction_bias"


def scale_names(name: str) -> tuple[str, ...]:
    return (name.replace(".weight", ".scale"),)


@pytest.fixture
def _quantised_family(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "laguna", replace(laguna_family.FAMILY, scale_names=scale_names))


quantised_family = pytest.mark.usefixtures("_quantised_family")


def quantised(stored: torch.dtype = torch.float32) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors of a checkpoint, and what they stand for in fp32."""
    tensors, plain = {}, {}
    for name, tensor in laguna_tensors(laguna(CONFIG)).items():
        if name.endswith("q_proj.weight"):
            codes = torch.randint(0, 0x7F, tensor.shape) + 0x80 * torch.randint(0, 2, tensor.shape)
            grid = torch.randint(112, 117, (2, 2))
            tensors |= {name: fp8(codes), name.replace(".weight", ".scale"): scales_of(grid)}
            plain[name] = from_definition(E4M3_VALUES, codes, grid, (128, 128)).float()
        elif ".mlp.experts." in name and name.endswith(".weight"):
            codes = torch.randint(0, 16, tensor.shape)
            grid = torch.randint(121, 126, (tensor.shape[0], tensor.shape[1] // 32))
            packed = (codes[:, ::2] + 16 * codes[:, 1::2]).to(torch.uint8).view(torch.int8)
            tensors |= {name: packed, name.replace(".weight", ".scale"): scales_of(grid)}
            plain[name] = from_definition(E2M1_VALUES, codes, grid, (1, 32)).float()
        else:
            kept = tensor if name == BIAS else tensor.to(stored)
            tensors[name], plain[name] = kept, kept
    return tensors, plain


def shard(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    """The same checkpoint in three files: neighbours by name, as a weight and its scales are, lie apart."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    weight_map = {name: f"model-{index % 3:05d}.safetensors" for index, name in enumerate(sorted(tensors))}
    assert weight_map[QUERY] != weight_map[QUERY_SCALE]
    for file in set(weight_map.values()):
        save_file({name: tensors[name] for name in tensors if weight_map[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


@quantised_family
@torch.no_grad()
@pytest.mark.parametrize("form", [write, shard])
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_a_quantised_checkpoint_is_the_model_of_its_values(
    stored: torch.dtype,
    dtype: torch.dtype | None,
    form: Callable[[Path, dict[str, Any], dict[str, Tensor]], Path],
    tmp_path: Path,
) -> None:
    tensors, plain = quantised(stored)
    model = kvell.from_pretrained(form(tmp_path / "quantised", CONFIG, tensors), dtype=dtype)
    assert model.dtype == (dtype or stored)
    ours = dict(model.named_tensors())
    wanted = plain[EXPERT].to(model.dtype)
    assert torch.equal(ours["layers.1.feed_forward.down_proj"][2], wanted)
    assert torch.equal(ours["layers.1.attention.q_proj.weight"], plain[QUERY].to(model.dtype))
    other = kvell.from_pretrained(write(tmp_path / "plain", CONFIG, plain), dtype=model.dtype)
    for name, tensor in other.named_tensors():
        assert same(ours[name], tensor), name
    logits = model(prompt())
    assert logits.isfinite().all()
    assert torch.equal(logits, other(prompt()))


@quantised_family
@torch.no_grad()
def test_a_model_of_quantised_weights_is_saved_as_what_it_computes_with(tmp_path: Path) -> None:
    model = kvell.from_pretrained(write(tmp_path / "quantised", CONFIG, quantised()[0]), dtype="bfloat16")
    model.save_pretrained(tmp_path / "saved")
    again = kvell.from_pretrained(tmp_path / "saved")
    assert again.dtype == torch.bfloat16
    assert torch.equal(model(prompt()), again(prompt()))


def with_byte(tensor: Tensor, index: tuple[int, int], byte: int) -> Tensor:
    changed = tensor.clone()
    changed.view(torch.uint8)[index] = byte
    return changed


Change = Callable[[dict[str, Tensor]], object]
MISFITS: dict[str, tuple[Change, list[str]]] = {
    "FP8 without scales": (lambda t: t.pop(QUERY_SCALE), [QUERY, QUERY_SCALE, "float8_e4m3fn", "missing"]),
    "FP4 without scales": (lambda t: t.pop(EXPERT_SCALE), [EXPERT, EXPERT_SCALE, "int8", "missing"]),
    "FP4 in unsigned bytes without scales": (
        lambda t: t.update({EXPERT: t[EXPERT].view(torch.uint8)}) or t.pop(EXPERT_SCALE),
        [EXPERT, EXPERT_SCALE, "uint8"],
    ),
    "scales without a weight": (lambda t: t.pop(QUERY), ["unexpected tensor", QUERY_SCALE]),
    "scales of a weight that is not quantised": (
        lambda t: t.update({QUERY: torch.ones(160, 160)}),
        ["unexpected tensor", QUERY_SCALE],
    ),
    "scales of a norm": (
        lambda t: t.update({"model.norm.scale": scales_of(torch.full((1, 1), 127))}),
        ["unexpected tensor", "model.norm.scale"],
    ),
    "scales of nothing": (
        lambda t: t.update({"model.layers.9.self_attn.q_proj.scale": scales_of(torch.full((1, 1), 127))}),
        ["unexpected tensor", "model.layers.9.self_attn.q_proj.scale"],
    ),
    "a quantised tensor too many": (
        lambda t: t.update(
            {
                "model.layers.9.self_attn.q_proj.weight": t[QUERY].clone(),
                "model.layers.9.self_attn.q_proj.scale": t[QUERY_SCALE].clone(),
            }
        ),
        ["unexpected tensor", "model.layers.9.self_attn.q_proj.weight"],
    ),
    "a scale too few along K": (
        lambda t: t.update({QUERY_SCALE: t[QUERY_SCALE][:, :1]}),
        [QUERY, "[160, 160]", "[2, 1]", "[2, 2]"],
    ),
    "a scale too many along N": (
        lambda t: t.update({QUERY_SCALE: scales_of(torch.full((3, 2), 127))}),
        [QUERY, "[160, 160]", "[3, 2]", "[2, 2]"],
    ),
    "scales in a row": (
        lambda t: t.update({QUERY_SCALE: t[QUERY_SCALE].flatten()}),
        [QUERY, "[160, 160]", "[4]", "[2, 2]"],
    ),
    "FP4 scales for blocks of 64": (
        lambda t: t.update({EXPERT_SCALE: t[EXPERT_SCALE][:, :1]}),
        [EXPERT, "[160, 64]", "[160, 1]", "[160, 2]"],
    ),
    "FP4 scales for rows together": (
        lambda t: t.update({EXPERT_SCALE: t[EXPERT_SCALE][:1]}),
        [EXPERT, "[160, 64]", "[1, 2]", "[160, 2]"],
    ),
    "scales of another dtype": (
        lambda t: t.update({QUERY_SCALE: torch.ones(2, 2, dtype=torch.bfloat16)}),
        [QUERY, "torch.bfloat16", "torch.float8_e8m0fnu or torch.float32"],
    ),
    **{
        f"an fp32 scale of {scale}": (
            lambda t, scale=scale: t.update({QUERY_SCALE: torch.tensor([[1.0, 1.0], [scale, 1.0]])}),
            [QUERY, "a scale is no positive finite number"],
        )
        for scale in (0.0, -1.0, math.inf, math.nan)
    },
    "a weight of a wrong shape": (
        lambda t: t.update({QUERY: t[QUERY][:, :159].contiguous()}),
        [QUERY, "[160, 159]", "[160, 160]"],
    ),
    "a packed weight of a wrong shape": (
        lambda t: t.update({EXPERT: t[EXPERT][:, :16].contiguous()}),
        [EXPERT, "[160, 32]", "[160, 64]"],
    ),
    "a packed weight of the unpacked shape": (
        lambda t: t.update({EXPERT: torch.ones(160, 64, dtype=torch.int8)}),
        [EXPERT, "[160, 128]", "[160, 64]"],
    ),
    "a vector in FP8": (
        lambda t: t.update({NORM: fp8(torch.ones(160)), "model.norm.scale": scales_of(torch.full((1, 2), 127))}),
        [NORM, "[160]", "matrices"],
    ),
    "a scale that is NaN": (
        lambda t: t.update({QUERY_SCALE: with_byte(t[QUERY_SCALE], (1, 1), 255)}),
        [QUERY, "NaN", "scale", "255"],
    ),
    "an FP4 scale that is NaN": (
        lambda t: t.update({EXPERT_SCALE: with_byte(t[EXPERT_SCALE], (159, 1), 255)}),
        [EXPERT, "NaN", "scale", "255"],
    ),
    "a code that is NaN": (
        lambda t: t.update({QUERY: with_byte(t[QUERY], (159, 159), 0x7F)}),
        [QUERY, "NaN", "code"],
    ),
    "a code that is NaN with a sign": (
        lambda t: t.update({QUERY: with_byte(t[QUERY], (0, 0), 0xFF)}),
        [QUERY, "NaN", "code"],
    ),
    "a value that is too large": (
        lambda t: t.update({QUERY_SCALE: with_byte(t[QUERY_SCALE], (0, 1), 254)}),
        [QUERY, "too large", "float32"],
    ),
    "an FP4 value that is too large": (
        lambda t: t.update(
            {EXPERT: with_byte(t[EXPERT], (5, 0), 0x07), EXPERT_SCALE: with_byte(t[EXPERT_SCALE], (5, 0), 254)}
        ),
        [EXPERT, "too large", "float32"],
    ),
    "an embedding that is quantised": (
        lambda t: t.update(
            {
                "model.embed_tokens.weight": fp8(torch.ones(97, 160)),
                "model.embed_tokens.scale": scales_of(torch.full((1, 2), 127)),
            }
        ),
        ["model.embed_tokens.weight", "float8_e4m3fn", "dtype"],
    ),
    "an embedding of integers": (
        lambda t: t.update({"model.embed_tokens.weight": torch.ones(97, 160, dtype=torch.int64)}),
        ["model.embed_tokens.weight", "int64"],
    ),
}


@quantised_family
@pytest.mark.parametrize("misfit", MISFITS)
def test_what_does_not_fit_is_refused_in_one_line_that_names_the_tensor(misfit: str, tmp_path: Path) -> None:
    change, words = MISFITS[misfit]
    tensors, _ = quantised()
    change(tensors)
    folder = write(tmp_path, CONFIG, tensors)
    with pytest.raises(kvell.CheckpointError) as refusal:
        kvell.from_pretrained(folder)
    message = str(refusal.value)
    assert "\n" not in message
    for word in words:
        assert word in message


@quantised_family
def test_a_quantised_embedding_is_read_where_a_dtype_is_given(tmp_path: Path) -> None:
    tensors, _ = quantised()
    codes = torch.randint(0, 0x7F, (97, 160))
    tensors["model.embed_tokens.weight"] = fp8(codes)
    tensors["model.embed_tokens.scale"] = scales_of(torch.tensor([[120, 121]]))
    model = kvell.from_pretrained(write(tmp_path, CONFIG, tensors), dtype="bfloat16")
    wanted = from_definition(E4M3_VALUES, codes, torch.tensor([[120, 121]]), (128, 128))
    assert torch.equal(model.embedding.weight, wanted.bfloat16())


def test_a_family_that_names_no_scales_reads_no_quantised_weight(tmp_path: Path) -> None:
    tensors, plain = quantised()
    with pytest.raises(kvell.CheckpointError, match=r"unexpected tensor .*\.scale"):
        kvell.from_pretrained(write(tmp_path / "with", CONFIG, tensors))
    with pytest.raises(
        kvell.CheckpointError, match=f"{QUERY} is stored as torch.float8_e4m3fn.* without its scales$"
    ):
        kvell.from_pretrained(write(tmp_path / "without", CONFIG, plain | {QUERY: tensors[QUERY]}))


def drafts(name: str, config: kvell.ModelConfig) -> bool:
    return name.startswith("draft.")


def towers(name: str, config: kvell.ModelConfig) -> bool:
    return name.startswith("tower.")


DRAFTS = {
    "draft.0.weight": fp8(torch.ones(3, 3)),
    "draft.0.scale": scales_of(torch.full((1, 1), 127)),
    "draft.0.norm.weight": torch.ones(3),
    "draft.1.scale": scales_of(torch.full((1, 1), 127)),
}
TOWERS = {"tower.0.weight": torch.ones(3)}


def told(folder: Path, noticed: set[str], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The warnings of loading with these rules noticed."""
    rules = {"a draft model": drafts, "pictures": towers}
    family = replace(
        laguna_family.FAMILY, skip_rules=rules, noticed_rules=frozenset(noticed), scale_names=scale_names
    )
    monkeypatch.setitem(FAMILIES, "laguna", family)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        kvell.from_pretrained(folder)
    assert all(one.filename == __file__ for one in caught)
    return [str(one.message) for one in caught]


def test_one_warning_says_how_much_was_left_out_by_the_rules_that_are_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors, _ = quantised()
    plain, full = tmp_path / "plain", tmp_path / "full"
    write(plain, CONFIG, tensors)
    write(full, CONFIG, tensors | DRAFTS | TOWERS)
    assert told(full, set(), monkeypatch) == []
    assert told(plain, {"a draft model"}, monkeypatch) == []
    (warning,) = told(full, {"a draft model"}, monkeypatch)
    assert "4 by the rule 'a draft model'" in warning
    assert "pictures" not in warning
    (warning,) = told(full, {"a draft model", "pictures"}, monkeypatch)
    assert "4 by the rule 'a draft model'" in warning
    assert "1 by the rule 'pictures'" in warning


# Integers: a module of this test's own, in the place of the last norm.

TABLE = "model.table"


class TableNorm(RMSNorm):
    """A norm with a table of integers beside it, none of them above 9."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.register_buffer("table", torch.zeros(4, 3, dtype=torch.int64))

    def check_loaded(self, name: str, values: Tensor) -> str | None:
        return f"names {int(values.max())}, and 9 is the most" if name == "table" and values.max() > 9 else None


@pytest.fixture
def _with_table(monkeypatch: pytest.MonkeyPatch) -> None:
    from kvell.checkpoint import loading

    def build(config: kvell.ModelConfig, dtype: torch.dtype) -> kvell.Decoder:
        model = build_empty(config, dtype)
        with torch.device("meta"):
            model.norm = TableNorm(config.hidden_size, config.norm_eps)
        return model

    def placements(config: kvell.ModelConfig) -> dict[str, Any]:
        return laguna_family.placements(config) | {TABLE: kvell.families.Placement("norm.table")}

    build_empty = loading.build_empty
    monkeypatch.setattr(loading, "build_empty", build)
    family = replace(laguna_family.FAMILY, placements=placements, scale_names=lambda name: (f"{name}_scale",))
    monkeypatch.setitem(FAMILIES, "laguna", family)


with_table = pytest.mark.usefixtures("_with_table")


def tabled(folder: Path, table: Tensor, **more: Tensor) -> Path:
    return write(folder, CONFIG, laguna_tensors(laguna(CONFIG)) | {TABLE: table} | more)


@with_table
@pytest.mark.parametrize("dtype", [None, "bfloat16", "float16", "float64"])
@pytest.mark.parametrize("stored", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8])
def test_integers_stay_integers(stored: torch.dtype, dtype: str | None, tmp_path: Path) -> None:
    table = torch.arange(12).view(4, 3) % 10
    model = kvell.from_pretrained(tabled(tmp_path, table.to(stored)), dtype=dtype)
    assert model.dtype == getattr(torch, dtype or "float32")
    loaded = dict(model.named_buffers())["norm.table"]
    assert loaded.dtype == torch.int64
    assert torch.equal(loaded, table)


@with_table
def test_a_tensor_is_not_its_own_scales(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "laguna", replace(FAMILIES["laguna"], scale_names=scale_names))
    assert scale_names(TABLE) == (TABLE,)
    model = kvell.from_pretrained(tabled(tmp_path, torch.ones(4, 3, dtype=torch.int8)))
    assert torch.equal(dict(model.named_buffers())["norm.table"], torch.ones(4, 3, dtype=torch.int64))


@with_table
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.bool])
def test_a_table_that_is_not_of_integers_is_refused(stored: torch.dtype, tmp_path: Path) -> None:
    with pytest.raises(kvell.CheckpointError, match=f"{TABLE} is stored as {stored}"):
        kvell.from_pretrained(tabled(tmp_path, torch.ones(4, 3).to(stored)))


@with_table
def test_a_table_of_another_shape_is_refused(tmp_path: Path) -> None:
    with pytest.raises(kvell.CheckpointError, match=rf"{TABLE} has the shape \[3, 4\], wanted is \[4, 3\]"):
        kvell.from_pretrained(tabled(tmp_path, torch.zeros(3, 4, dtype=torch.int64)))


@with_table
def test_a_table_has_no_scales(tmp_path: Path) -> None:
    table, scales = torch.zeros(4, 3, dtype=torch.int8), scales_of(torch.full((4, 1), 127))
    with pytest.raises(kvell.CheckpointError, match=f"{TABLE} has the scales {TABLE}_scale"):
        kvell.from_pretrained(tabled(tmp_path, table, **{f"{TABLE}_scale": scales}))


@with_table
def test_a_module_can_refuse_what_was_read_for_it(tmp_path: Path) -> None:
    with pytest.raises(kvell.CheckpointError, match=f"model.safetensors: {TABLE} names 10, and 9 is the most$"):
        kvell.from_pretrained(tabled(tmp_path, torch.full((4, 3), 10)))


@quantised_family
@torch.no_grad()
def test_reading_changes_no_file(tmp_path: Path) -> None:
    folder = write(tmp_path, CONFIG, quantised()[0])
    before = (folder / "model.safetensors").read_bytes()
    model = kvell.from_pretrained(folder)
    for parameter in model.parameters():
        parameter.add_(1)
    del model
    assert (folder / "model.safetensors").read_bytes() == before
    assert load_file(folder / "model.safetensors")[QUERY].dtype == torch.float8_e4m3fn
