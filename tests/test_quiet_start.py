"""A fresh model's blocks begin by adding next to nothing, whatever stands between them and the residual."""

from typing import Any

import pytest
import torch
from pairwise import configs
from torch import Tensor
from torch.nn import functional as F

from kvell import Decoder, ModelConfig
from kvell.config_file import resolve
from kvell.layer import Layer
from kvell.step import Observed
from kvell.training.initialisation import quiet_start

VOCABULARY = 128
ATTENTION = {
    "kind": "grouped_query",
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 16,
    "rotary": {"kind": "default", "theta": 10000.0},
}
GATED = {"kind": "gated_mlp", "intermediate_size": 128}
MIXTURE = {
    "kind": "mixture_of_experts",
    "num_experts": 8,
    "top_k": 2,
    "intermediate_size": 32,
    "shared_intermediate_size": 32,
    "router": {"kind": "mlp", "hidden_size": 16},
}
PLACEMENTS = ("pre", "sandwich", "post")


def quiet(placement: str, feed_forward: dict[str, Any], **changes: Any) -> Decoder:
    layer = {
        "attention": ATTENTION,
        "feed_forward": feed_forward,
        "attention_norm": placement,
        "feed_forward_norm": placement,
    }
    model = {"vocab_size": VOCABULARY, "hidden_size": 64, "max_positions": 256, "tied_head": True, **changes}
    torch.manual_seed(0)
    made = Decoder(resolve({**model, "layers": [layer] * 4}, "model"))
    quiet_start(made)
    return made


def tokens() -> Tensor:
    return torch.randint(VOCABULARY, (2, 49), generator=torch.Generator().manual_seed(1))


def loss_of(model: Decoder) -> Tensor:
    ids = tokens()
    return F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


def first_gradient_norm(model: Decoder) -> float:
    loss_of(model).backward()
    return float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))


@pytest.mark.parametrize("embedding_scale", [1.0, 8.0])
@pytest.mark.parametrize("changes", [{}, {"per_layer_embedding": {"width": 8}}], ids=["", "per-layer embedding"])
@pytest.mark.parametrize("feed_forward", [GATED, MIXTURE], ids=["dense", "mixture"])
def test_the_first_gradient_is_no_steeper_behind_a_norm(
    feed_forward: dict[str, Any], changes: dict[str, Any], embedding_scale: float
) -> None:
    """A projection that is zero in front of an RMSNorm would make it a hundred times that of pre-norm blocks."""
    plain = first_gradient_norm(quiet("pre", feed_forward, embedding_scale=embedding_scale))
    for placement in PLACEMENTS:
        norm = first_gradient_norm(quiet(placement, feed_forward, embedding_scale=embedding_scale, **changes))
        assert plain / 2 < norm < 2 * plain, placement


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("feed_forward", [GATED, MIXTURE], ids=["dense", "mixture"])
def test_one_step_moves_the_logits_by_a_few_percent(placement: str, feed_forward: dict[str, Any]) -> None:
    model = quiet(placement, feed_forward, per_layer_embedding={"width": 8})
    before = model(tokens()).detach()
    first_gradient_norm(model)
    torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0).step()
    assert (model(tokens()) - before).norm() / before.norm() < 0.1


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("feed_forward", [GATED, MIXTURE], ids=["dense", "mixture"])
def test_the_residual_begins_as_the_embedded_token(placement: str, feed_forward: dict[str, Any]) -> None:
    model = quiet(placement, feed_forward, per_layer_embedding={"width": 8})
    _, residual = model(tokens(), return_streams=True)
    embedded = model.embedding(tokens())
    assert (residual - embedded).norm() / embedded.norm() < 0.1


def test_each_placement_is_made_quiet_where_its_block_ends() -> None:
    """Projections are zero where nothing stands behind them, and as drawn behind a norm."""
    pre, sandwich = quiet("pre", MIXTURE), quiet("sandwich", MIXTURE)
    for name, weight in pre.named_parameters():
        ends = (".o_proj.weight", "feed_forward.down_proj", "shared_expert.down_proj.weight")
        assert bool((weight == 0).all()) == name.endswith((*ends, "bias")), name
    for name, weight in sandwich.named_parameters():
        if name.endswith("output_norm.weight"):
            torch.testing.assert_close(weight, torch.full_like(weight, 0.01 * 0.02))
        elif weight.dim() > 1:
            assert float(weight.detach().std()) == pytest.approx(0.02, rel=0.2), name


def test_a_dense_feed_forward_beside_experts_is_quiet_at_both_its_norms() -> None:
    both = {"kind": "dense_beside_experts", "dense": GATED, "mixture": MIXTURE}
    model = quiet("pre", both)
    layer = model.layers[0]
    assert isinstance(layer, Layer)
    ends = {id(weight) for weight in layer.output_weights()}
    names = {name for name, weight in layer.named_parameters() if id(weight) in ends}
    assert names == {
        "attention.o_proj.weight",
        "feed_forward.dense_output_norm.weight",
        "feed_forward.mixture_output_norm.weight",
    }
    assert first_gradient_norm(model) < 2 * first_gradient_norm(quiet("pre", GATED))


@pytest.mark.parametrize("kind", ["mlp", "sigmoid", "softmax", "sqrt_softplus"])
def test_tokens_are_routed_apart_from_the_first_step_on(kind: str) -> None:
    router = {"kind": kind, **({"hidden_size": 16} if kind == "mlp" else {})}
    model, observed = quiet("pre", {**MIXTURE, "top_k": 1, "router": router}), Observed()
    model(tokens(), observed=observed)
    assert len(observed.expert_loads) == 4
    for loads in observed.expert_loads.values():
        assert (loads > 0).sum() >= 4, loads


@pytest.mark.parametrize("config", configs().values(), ids=[str(number) for number in range(len(configs()))])
def test_any_mix_of_techniques_begins_quietly(config: ModelConfig) -> None:
    """No block is missed: behind all of them every stream of the residual still is the embedded token."""
    torch.manual_seed(0)
    model = Decoder(config)
    quiet_start(model)
    ids = torch.randint(config.vocab_size, (1, 12))
    _, residual = model(ids, return_streams=True)
    embedded = model.ends.open(model.embedding(ids[0]) * config.embedding_scale)
    assert (residual[0] - embedded).norm() / embedded.norm() < 0.1
