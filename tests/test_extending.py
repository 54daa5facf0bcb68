"""What others add from outside the package stands where the package's own does: an attention, a family, a kernel."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch
from linear_attention import LinearAttention
from strategies import random_model
from torch import Tensor
from torch.nn import functional as F

import kvell
from kvell import families, kernels
from kvell.cli import main
from kvell.config import LayerConfig, ModelConfig
from kvell.kernels import linear, table
from kvell.kernels.table import Kernel, KernelVersion, noted_choices
from kvell.layers.contract import AttentionPart
from kvell.layers.feed_forward import GatedMLP
from kvell.layers.registry import ATTENTIONS

VOCAB = 50


@pytest.fixture
def _registered() -> Iterator[None]:
    kvell.register(LinearAttention)
    yield
    del ATTENTIONS.kinds["linear"]


def mixed_config() -> ModelConfig:
    """The foreign attention between two of the package's own."""
    own = {"kind": "grouped_query", "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "rotary": None}
    foreign = {"kind": "linear", "num_heads": 2, "head_dim": 8, "window": 5}
    layers = [
        {"attention": attention, "feed_forward": {"kind": "gated_mlp", "intermediate_size": 24}}
        for attention in (own, foreign, own)
    ]
    values = {"vocab_size": VOCAB, "hidden_size": 16, "max_positions": 64, "layers": layers}
    return ModelConfig.from_dict(values)


def windowed_sums(module: object, x: Tensor, window: int) -> Tensor:
    """The formula, token by token."""
    q, kv = module.q_proj(x).view(-1, 2, 8), module.kv_proj(x)  # type: ignore[attr-defined]
    k, v = (half.view(-1, 2, 8) for half in kv.chunk(2, dim=1))
    phi = [F.elu(part) + 1 for part in (q, k)]
    outputs = []
    for t in range(len(x)):
        seen = slice(max(t - window + 1, 0), t + 1)
        weights = (phi[0][t] * phi[1][seen]).sum(-1)
        outputs.append(((weights[..., None] * v[seen]).sum(0) / weights.sum(0)[:, None]).flatten())
    return module.o_proj(torch.stack(outputs))  # type: ignore[attr-defined]


@pytest.mark.usefixtures("_registered")
def test_a_foreign_attention_is_its_formula_however_a_sequence_is_fed(tmp_path: Path) -> None:
    model = random_model(mixed_config())
    tokens = torch.randint(0, VOCAB, (2, 23))
    whole = model(tokens).detach()
    cache = model.make_cache(2, max_rewind=4)
    parts = [model(tokens[:, at : at + 5], cache=cache) for at in range(0, 20, 5)]
    cache.rewind(3)
    cache.save(tmp_path / "cache")
    again = kvell.Cache.load(tmp_path / "cache", model)
    rest = [model(tokens[:, at : at + 1], cache=again) for at in range(17, 23)]
    torch.testing.assert_close(
        torch.cat([*parts, *rest], dim=1)[:, [*range(17), *range(20, 26)]], whole, atol=1e-4, rtol=0
    )
    ragged = model(tokens.flatten()[None, :30], counts=[23, 7])
    torch.testing.assert_close(ragged[0, 23:], whole[1, :7], atol=1e-4, rtol=0)
    layer = model.layers[1].attention
    noted: list[tuple[Tensor, Tensor]] = []
    layer.register_forward_hook(lambda module, given, y: noted.append((given[0], y)))
    model(tokens[:1])
    torch.testing.assert_close(noted[0][1], windowed_sums(layer, noted[0][0], 5), atol=1e-5, rtol=1e-5)


@pytest.mark.usefixtures("_registered")
def test_a_foreign_attention_is_compiled_saved_planned_and_inspected(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = random_model(mixed_config())
    model.save_pretrained(tmp_path / "model")
    again = kvell.from_pretrained(tmp_path / "model")
    tokens = torch.randint(0, VOCAB, (1, 12))
    assert torch.equal(again(tokens), model(tokens))
    plain, cache = model.make_cache(), model.make_cache()
    expected = [model(tokens[:, at : at + 1], cache=plain) for at in range(12)]
    model.compile_decoding(folder=tmp_path / "code")
    for at, wanted in enumerate(expected):
        torch.testing.assert_close(model(tokens[:, at : at + 1], cache=cache), wanted, atol=1e-4, rtol=0)
    plan = kvell.plan(model.config, 40, dtype="float32")
    assert plan.parameters == model.num_parameters()
    held = model.make_cache()
    model(torch.zeros(1, 40, dtype=torch.long), cache=held)
    assert plan.cache_bytes == held.nbytes
    assert main(["inspect", str(tmp_path / "model"), "--json"]) == 0
    layers = json.loads(capsys.readouterr().out)["layers"]
    assert [layer["attention"] for layer in layers] == ["grouped_query", "linear", "grouped_query"]
    assert layers[1]["sliding_window"] == 5
    assert main(["plan", str(tmp_path / "model"), "--context", "1K", "--what-if", "all"]) == 0


def test_an_unknown_kind_names_those_that_are_known() -> None:
    with pytest.raises(kvell.ConfigError, match=r"layers.1.attention: kind 'linear' is unknown; known are 'grouped"):
        mixed_config()


def test_what_keeps_no_contract_is_refused_by_what_it_lacks() -> None:
    class Half(AttentionPart):
        kind: Literal["half"] = "half"

    class Shadow(LinearAttention):
        kind: Literal["grouped_query"] = "grouped_query"  # type: ignore[assignment]

    class Odd(LinearAttention):
        kind: Literal["odd"] = "odd"  # type: ignore[assignment]

        def works(self, place: int) -> tuple[()]:  # type: ignore[override]
            return ()

    for part, problem in (
        (Half, "it lacks build, describe, full_attention_width, streams, works"),
        (Shadow, "the attention kind 'grouped_query' is GroupedQuery's"),
        (Odd, r"works takes \(self, place\), wanted is \(self, site, source\)"),
        (LayerConfig, "it derives from none of AttentionPart, FeedForwardPart"),
    ):
        with pytest.raises(kvell.ConfigError, match=problem):
            kvell.register(part)
    assert set(ATTENTIONS.kinds) == {"grouped_query", "convolutional", "compressed"}


def test_a_relabelled_family_is_one_value(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    laguna = families.FAMILIES["laguna"]
    lagoon = replace(
        laguna,
        name="lagoon",
        model_types=("lagoon",),
        read_config=lambda values, **how: laguna.read_config(values | {"model_type": "laguna"}, **how).model_copy(
            update={"family": "lagoon"}
        ),
        write_config=lambda config: laguna.write_config(config) | {"model_type": "lagoon"},
    )
    monkeypatch.setitem(families.FAMILIES, "lagoon", lagoon)
    attention = {"kind": "grouped_query", "num_heads": 4, "num_kv_heads": 2, "head_dim": 8}
    attention |= {"rotary": {"kind": "default", "theta": 1e4}, "output_gate": "per_head"}
    layer = {"attention": attention, "feed_forward": GatedMLP(intermediate_size=24).model_dump()}
    values = {"family": "lagoon", "vocab_size": VOCAB, "hidden_size": 16, "max_positions": 64, "layers": [layer] * 2}
    model = random_model(ModelConfig.from_dict(values))
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "lagoon"
    again = kvell.from_pretrained(tmp_path)
    assert again.config == model.config
    tokens = torch.arange(9)[None]
    assert torch.equal(again(tokens), model(tokens))


def test_a_kernel_takes_one_version_more(monkeypatch: pytest.MonkeyPatch) -> None:
    def of_ones(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)

    def refuses(x: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
        return None if bool((x == 1).all()) else "not all ones"

    monkeypatch.setitem(table.KERNELS, "linear", linear.LINEAR)  # what the table has afterwards
    own = KernelVersion("of ones", "torch", of_ones, refuses)
    monkeypatch.setattr(linear, "LINEAR", Kernel("linear", own, *linear.LINEAR.versions))
    weight = torch.randn(3, 4)
    with torch.no_grad(), noted_choices() as made:
        linear.linear(torch.ones(2, 4), weight)
        linear.linear(torch.zeros(1, 4), weight)
        with kernels.use("reference"):
            linear.linear(torch.ones(2, 4), weight)
    assert [choice.taken for choice in made] == ["of ones", "one row", "reference"]
    assert made[1].others["of ones"] == "not all ones"
    assert made[0].others["one row"] == "several rows"
    assert made[0].others["reference"] == "of ones comes first"
