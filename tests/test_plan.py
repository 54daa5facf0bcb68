"""Plans as values: what fits, what techniques save, what engines reserve, and how wrong input is refused."""

import json
import re
import subprocess
import sys

import pytest
import torch
from oracle import DEEPSEEK_V4, GEMMA4, LAGUNA, ZAYA

import kvell
from kvell import Decoder, InputError, ModelConfig
from kvell.families import parse_config
from kvell.long_prompts import MAX_STEP
from kvell.planning import batch_that_fits, context_that_fits
from kvell.planning.engine import Engine, engine_nbytes
from kvell.planning.formats import BFLOAT16
from kvell.planning.references import known_config
from kvell.planning.roofline import DEVICES, Device, measured_device
from kvell.planning.what_if import waterfall, what_if

FAMILIES = {"gemma4": GEMMA4, "laguna": LAGUNA, "zaya": ZAYA, "deepseek_v4": DEEPSEEK_V4}
MIB = 1 << 20
SLOW = Device("slow", 10**9, 1e9, 1e12)


def held_by(config: ModelConfig, context: int, batch_size: int) -> int:
    """Bytes of a real model's weights and a real cache, and the working set planned for its prefill."""
    model = Decoder(config)
    cache = model.make_cache(batch_size, max_length=context)
    weights = sum(tensor.nbytes for _, tensor in model.named_tensors())
    return weights + cache.allocated_nbytes + kvell.plan(config, context, batch_size, "float32").working_bytes


@pytest.mark.parametrize("family", ["laguna", "zaya", "deepseek_v4"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_longest_context_fits_when_it_is_allocated_and_one_block_more_does_not(
    family: str, batch_size: int
) -> None:
    config = parse_config(FAMILIES[family]).model_copy(update={"max_positions": 1 << 30})
    memory = 48 * MIB
    context = context_that_fits(config, memory, batch_size, "float32")
    assert held_by(config, context, batch_size) <= memory < held_by(config, context + 64, batch_size)


@pytest.mark.parametrize("positions", [1, 63, 1000])
def test_the_longest_context_ends_at_the_models_positions(positions: int) -> None:
    config = parse_config(LAGUNA).model_copy(update={"max_positions": positions})
    assert context_that_fits(config, 48 * MIB, 1, "float32") == positions
    weights = sum(tensor.nbytes for _, tensor in Decoder(config).named_tensors())
    with pytest.raises(InputError, match=f"a context of {min(positions, 64)} tokens does not fit"):
        context_that_fits(config, weights + 9, 1, "float32")


def test_the_largest_batch_fits_when_it_is_allocated_and_one_more_does_not() -> None:
    config = parse_config(LAGUNA)
    batch = batch_that_fits(config, 48 * MIB, 1000, "float32")
    assert batch > 1
    assert held_by(config, 1000, batch) <= 48 * MIB < held_by(config, 1000, batch + 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_works_in_the_memory_of_one_sequence_once_that_fills_a_step(family: str) -> None:
    """Attention sees one sequence's rows at a time, and a step of a prefill has so many tokens at most."""
    config = parse_config(FAMILIES[family])
    assert kvell.plan(config, MAX_STEP, 64).working_bytes == kvell.plan(config, MAX_STEP).working_bytes
    assert kvell.plan(config, 8, 64).working_bytes > kvell.plan(config, 8).working_bytes


def test_a_batch_shares_weights_and_working_set_and_each_sequence_has_its_cache() -> None:
    one = kvell.plan("deepseek-v4-flash", 131_072, dtype="released")
    memory = 320 * 10**9
    shared = one.resident_weight_bytes + one.working_bytes
    config = known_config("deepseek-v4-flash")
    assert batch_that_fits(config, memory, 131_072, "released") == (memory - shared) // one.reserved_bytes


def test_a_memory_too_small_for_the_weights_says_by_how_much() -> None:
    config = parse_config(LAGUNA)
    weights = sum(tensor.nbytes for _, tensor in Decoder(config).named_tensors())
    with pytest.raises(InputError, match=f"the weights take {weights:,} bytes, 9 more than the {weights - 9:,}"):
        context_that_fits(config, weights - 9, 1, "float32")
    with pytest.raises(InputError, match=r"a context of 64 tokens does not fit: .* bytes are missing"):
        context_that_fits(config, weights + 9, 1, "float32")
    with pytest.raises(InputError, match=r"a context of 64 tokens does not fit once: .* bytes are missing"):
        batch_that_fits(config, weights + 9, 64, "float32")


@pytest.mark.parametrize(
    ("device", "mapped", "resident"),
    [
        ("desktop-ddr5", None, 4.560),
        ("h100", None, 9.257),
        ("h100", True, 4.560),
        ("desktop-ddr5", False, 9.257),
        (Device("a phone", 10**9, 1e9, 1e12, type="mps"), None, 9.257),
    ],
)
def test_a_large_per_layer_table_stays_on_disk_on_a_cpu(
    device: str | Device, mapped: bool | None, resident: float
) -> None:
    """Gemma 4 E2B: 2,348,810,240 of 4,628,569,344 numbers are the table's."""
    plan = kvell.plan("gemma-4-e2b", 64, device=device, map_per_layer_table=mapped)
    table = next(part for part in plan.weights if part.part == "per-layer table")
    assert (plan.parameters, table.numbers) == (4_628_569_344, 2_348_810_240)
    assert table.mapped is (resident < 9)
    assert round(plan.resident_weight_bytes / 1e9, 3) == resident


def test_released_weights_are_fp8_and_fp4_with_their_scales() -> None:
    """V4 Flash's experts: 43 layers of 256 routed, half a byte a number and a byte of scale for 32, and a shared one
    in FP8 with a byte for 128 x 128; three matrices of 4096 x 2048 each."""
    matrix = 4096 * 2048
    routed, shared = 256 * 3 * (matrix // 2 + matrix // 32), 3 * (matrix + 32 * 16)
    parts = {part.part: part.nbytes for part in kvell.plan("deepseek-v4-flash", 64, dtype="released").weights}
    assert parts["experts"] == 43 * (routed + shared)
    assert parts["head"] == 129_280 * 4096 * 2


def test_a_family_released_in_16_bits_has_16_bits() -> None:
    assert kvell.plan("gemma-4-e2b", 64, dtype="released") == kvell.plan("gemma-4-e2b", 64, dtype="bf16")


def test_fp8_halves_matrices_and_rows() -> None:
    sixteen, eight = (kvell.plan("llama-3.1-8b", 1000, dtype=dtype) for dtype in ("bfloat16", "fp8"))
    assert 2 * eight.cache_bytes == sixteen.cache_bytes
    halved = {"projections", "feed-forward"}
    for narrow, wide in zip(eight.weights, sixteen.weights, strict=True):
        assert narrow.nbytes * (2 if narrow.part in halved else 1) == wide.nbytes


def test_a_decoding_step_reads_the_experts_of_its_tokens() -> None:
    """Of 16 experts in 3 layers, three matrices of 12 x 32 each, one token reads 4, and a thousand read all."""
    config = parse_config(LAGUNA | {"num_experts": 16, "num_experts_per_tok": 4})
    one, many = (kvell.plan(config, 1, batch_size) for batch_size in (1, 1000))
    all_experts = 3 * 16 * 3 * 12 * 32 * 2
    embedding = 97 * 32 * 2  # of which one token reads a row, and a thousand all
    grown = many.read_bytes - many.cache_bytes - (one.read_bytes - one.cache_bytes)
    assert grown == pytest.approx(all_experts * 3 / 4 + embedding * 96 / 97, rel=1e-3)


def test_bounds_are_the_slower_of_reading_and_computing() -> None:
    plan = kvell.plan("llama-3.1-8b", 1000, device=SLOW)
    assert plan.seconds_per_token == plan.read_bytes / 1e9
    assert plan.seconds_to_first_token == pytest.approx(
        max(sum(plan.prefill_flops.values()) / 1e12, plan.weight_bytes / 1e9)
    )


def test_this_machine_can_be_measured() -> None:
    device = measured_device(torch.float32)
    assert device.bytes_per_second > 1e8
    assert device.flops_per_second > 1e8


def test_a_plan_goes_out_as_json() -> None:
    plan = kvell.plan("zaya1-8b", 1000, 2)
    values = json.loads(plan.to_json())
    assert values["cache_bytes"] == plan.cache_bytes
    assert values["device"]["name"] == "h100"
    assert values["flops_per_token"] == sum(values["decode_flops"].values())
    assert [stream["name"] for stream in values["streams"]] == ["key", "value", "query_key", "delayed_value"]


def test_the_waterfall_ends_at_what_the_model_holds() -> None:
    """E2B, values a token: 28 x 512 + 7 x 1024 in all layers, 12 x 512 + 3 x 1024 in those with own keys."""
    config, tokens = known_config("gemma-4-e2b"), 131_072
    fall = waterfall(config, tokens, BFLOAT16)
    assert fall.plain_bytes == tokens * 2 * (28 * 512 + 7 * 1024)
    assert fall.cache_bytes == kvell.plan(config, tokens).cache_bytes
    assert fall.plain_bytes - sum(saving.saved_bytes for saving in fall.savings) == fall.cache_bytes
    alone = {saving.technique: saving.saved_alone_bytes for saving in fall.savings}
    assert alone == {
        "windows": 28 * (tokens - 511) * 512 * 2,
        "sharing": tokens * 2 * (16 * 512 + 4 * 1024),
    }


@pytest.mark.parametrize(
    ("model", "change", "values_per_token"),
    [
        ("gemma-4-e2b", "gqa", 35 * 2 * 8 * 128),
        ("zaya1-8b", "mha", 40 * 2 * 16 * 128),
        ("laguna-xs.2", "all-full", 40 * 2 * 8 * 128),
        ("deepseek-v4-flash", "all-full", 43 * 512),
    ],
)
def test_what_a_model_would_hold_otherwise(model: str, change: str, values_per_token: int) -> None:
    changed = what_if(known_config(model), change, 131_072, BFLOAT16).cache_bytes
    constant = kvell.plan(model, 131_072).constant_bytes
    assert 0 <= changed - 131_072 * 2 * values_per_token <= constant


def test_an_engine_reserves_more_for_reasons() -> None:
    """E2B: 12 windowed layers of 512 values a row and 3 full ones of 1,024, all of one KV head."""
    config = known_config("gemma-4-e2b")

    def reserved(**options: object) -> int:
        return engine_nbytes(config, BFLOAT16, 1000, Engine(**options))  # type: ignore[arg-type]

    assert reserved() == kvell.plan(config, 1000).cache_bytes
    assert reserved(block_tokens=16) == 2 * (12 * 512 * 512 + 3 * 1024 * 1008)
    assert reserved(window_rows="full") == 2 * 1000 * (12 * 512 + 3 * 1024)
    assert reserved(tensor_parallel=4) == 4 * reserved()
    laguna = known_config("laguna-xs.2")
    whole = engine_nbytes(laguna, BFLOAT16, 1000, Engine())
    assert engine_nbytes(laguna, BFLOAT16, 1000, Engine(tensor_parallel=8)) == whole
    assert engine_nbytes(laguna, BFLOAT16, 1000, Engine(tensor_parallel=16)) == 2 * whole
    assert [name for name, _ in Engine(16, "full").steps] == ["blocks of 16 tokens", "full rows in windowed layers"]


def test_a_context_beyond_the_positions_is_planned_with_a_warning() -> None:
    assert kvell.plan("gemma-4-e2b", 131_072).warnings == ()
    assert kvell.plan("gemma-4-e2b", 131_073).warnings == (
        "131073 tokens, and the model has 131072 positions: it extrapolates",
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": 0}, "context must be at least 1, not 0"),
        ({"batch_size": -2}, "batch_size must be at least 1, not -2"),
        ({"max_rewind": -1}, "max_rewind must be at least 0, not -1"),
        ({"dtype": "int3"}, "dtype int3 is unknown: use one of float32, bfloat16, float16, fp8, released"),
        ({"device": "abacus"}, f"device abacus is unknown: use one of {', '.join(DEVICES)}"),
    ],
)
def test_wrong_input_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        kvell.plan("gemma-4-e2b", **({"context": 100} | options))  # type: ignore[arg-type]


def test_a_config_of_no_family_has_no_released_format() -> None:
    with pytest.raises(InputError, match="of no released family"):
        kvell.plan("llama-2-7b", 100, dtype="released")


def test_a_plan_starts_no_compiler() -> None:
    """Importing torch's compiler takes as long as importing torch."""
    code = "import sys, kvell; kvell.plan('gemma-4-e2b', 64); sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
