"""The rounding of DeepSeek V4's released inference code, simulated: what it touches and what it leaves alone."""

import pytest
import torch
from strategies import random_model

import kvell
from kvell.config import LayerConfig, ModelConfig
from kvell.kernels.rounding import round_fp4, round_fp8
from kvell.layers.compressed import Compressed
from kvell.layers.compressor import Compressor
from kvell.layers.feed_forward import GatedMLP
from kvell.layers.indexer import Indexer
from kvell.layers.rotary import DefaultRotary


def config(head_dim: int = 72, index_width: int = 32) -> ModelConfig:
    attention = Compressed(
        num_heads=2,
        head_dim=head_dim,
        sliding_window=6,
        rotary=DefaultRotary(theta=100.0),
        rotary_width=8,
        query_rank=12,
        output_rank=6,
        compressor=Compressor(ratio=4, overlap=True),
        indexer=Indexer(num_heads=4, head_dim=index_width, top_k=3),
    )
    layer = LayerConfig(attention=attention, feed_forward=GatedMLP(intermediate_size=24))
    return ModelConfig(vocab_size=31, hidden_size=16, max_positions=256, layers=(layer,))


def held_after_a_prompt(model: kvell.Decoder) -> dict[str, torch.Tensor]:
    cache = model.make_cache()
    model(torch.arange(31)[None], cache=cache)
    return {name: stream.held for (_, name), stream in cache.sequences[0].streams.items()}


def test_rows_and_entries_are_held_in_the_released_precision_but_for_what_is_turned() -> None:
    held = held_after_a_prompt(random_model(config().with_released_rounding()))
    for name in ("window", "entry"):
        plain, turned = held[name].split([64, 8], dim=1)
        assert torch.equal(round_fp8(plain, 64), plain)
        assert not torch.equal(round_fp8(turned, 8), turned)
    assert torch.equal(round_fp4(held["index"], 32), held["index"])


def test_raw_rows_are_not_rounded() -> None:
    exact, rounded = (
        held_after_a_prompt(random_model(config())),
        held_after_a_prompt(random_model(config().with_released_rounding())),
    )
    for name in ("entry_raw", "index_raw"):
        assert torch.equal(exact[name], rounded[name])


def test_nothing_is_rounded_without_the_switch() -> None:
    held = held_after_a_prompt(random_model(config()))
    assert not torch.equal(round_fp8(held["window"][:, :64], 64), held["window"][:, :64])
    assert not torch.equal(round_fp4(held["index"], 32), held["index"])


def test_a_rotation_of_queries_and_keys_alike_leaves_the_indexers_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    """ATOM 1507: a Hadamard transform of one side only. Without the rounding behind it, it must change nothing."""
    for name in ("round_fp4", "round_fp8"):
        monkeypatch.setattr(f"kvell.layers.compressed.{name}", lambda x, block: x)
    tokens = torch.arange(31)[None]
    with torch.no_grad():
        plain = random_model(config())(tokens)
        turned = random_model(config().with_released_rounding())(tokens)
    torch.testing.assert_close(turned, plain, atol=1e-4, rtol=1e-4)


def test_the_switch_is_there_when_loading(tmp_path: pytest.TempPathFactory) -> None:
    random_model(config()).save_pretrained(tmp_path)
    model = kvell.from_pretrained(tmp_path, released_rounding=True)
    assert model.config == config().with_released_rounding()


def test_widths_that_the_released_formats_do_not_fit_are_refused() -> None:
    with pytest.raises(kvell.ConfigError, match="released_rounding: 56 channels that are not turned"):
        config(head_dim=64).with_released_rounding()
    with pytest.raises(kvell.ConfigError, match="released_rounding: the indexer's 24 channels"):
        config(index_width=24).with_released_rounding()


def test_a_model_that_has_no_such_rounding_says_so() -> None:
    with pytest.raises(kvell.ConfigError, match="no layer of this model rounds"):
        kvell.ModelConfig.from_pretrained("zaya1-8b").with_released_rounding()
