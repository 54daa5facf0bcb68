"""Planned bytes are the cache's own, to the byte."""

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from oracle import DEEPSEEK_V4, GEMMA4, LAGUNA, ZAYA
from strategies import configs

import kvell
from kvell import Cache, Decoder, ModelConfig
from kvell.families import builtin_names, parse_config

FAMILIES = {"gemma4": GEMMA4, "laguna": LAGUNA, "zaya": ZAYA, "deepseek_v4": DEEPSEEK_V4}
HUNDRED = settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
)


def check_bytes(config: ModelConfig, length: int, batch_size: int, max_rewind: int) -> None:
    """Of a cache that a prompt has filled in one step, growing and reserved."""
    plan = kvell.plan(config, length, batch_size, torch.float32, max_rewind=max_rewind)
    model = Decoder(config).eval()
    tokens = torch.randint(0, config.vocab_size, (batch_size, length))
    grown, reserved = (model.make_cache(batch_size, max_rewind, limit) for limit in (None, length))
    assert plan.reserved_bytes == reserved.allocated_nbytes
    for cache, allocated in ((grown, plan.grown_bytes), (reserved, plan.reserved_bytes)):
        with torch.no_grad():
            model(tokens, cache=cache)
        assert plan.cache_bytes == cache.nbytes
        assert allocated == cache.allocated_nbytes
    held = batch_size * (length * plan.bytes_per_token + plan.constant_bytes)
    strides = [stream.stride for stream in plan.streams]
    assert plan.cache_bytes <= held
    assert max(strides) > 1 or plan.cache_bytes == held


@pytest.mark.parametrize(("length", "batch_size", "max_rewind"), [(1, 1, 0), (40, 3, 0), (150, 1, 7), (129, 2, 500)])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_holds_and_reserves_what_was_planned(
    family: str, length: int, batch_size: int, max_rewind: int
) -> None:
    check_bytes(parse_config(FAMILIES[family]), length, batch_size, max_rewind)


@HUNDRED
@given(
    config=configs(),
    length=st.integers(1, 150),
    batch_size=st.integers(1, 3),
    max_rewind=st.sampled_from([0, 1, 9, 400]),
)
def test_a_mixed_model_holds_and_reserves_what_was_planned(
    config: ModelConfig, length: int, batch_size: int, max_rewind: int
) -> None:
    check_bytes(config, length, batch_size, max_rewind)


@pytest.mark.parametrize("name", builtin_names())
@pytest.mark.parametrize("max_rewind", [0, 3])
def test_a_released_model_reserves_what_was_planned(name: str, max_rewind: int) -> None:
    """On the meta device, which reserves nothing."""
    config = ModelConfig.from_pretrained(name)
    cache = Cache(config.streams(), 2, max_rewind, 100_003, dtype=torch.bfloat16, device="meta")
    assert kvell.plan(config, 100_003, 2, max_rewind=max_rewind).reserved_bytes == cache.allocated_nbytes


def test_streams_and_groups_of_layers_add_up_to_the_cache() -> None:
    plan = kvell.plan("deepseek-v4-flash", 10_001, max_rewind=5)
    assert sum(stream.nbytes for stream in plan.streams) == plan.cache_bytes
    assert sum(group.nbytes for group in plan.layer_groups) == plan.cache_bytes
    assert sum(group.bytes_per_token for group in plan.layer_groups) == plan.bytes_per_token
