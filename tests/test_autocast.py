"""What keeps fp32 under autocast: the weights of hyper-connections, the experts and entries that are chosen."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kvell import Decoder, kernels
from kvell.config_file import resolve
from kvell.kernels.attention import attention_reference
from kvell.kernels.compressed import attention_mass, compressed_attention_reference, index_scores
from kvell.kernels.hyper_connections import hyper_read, hyper_write
from kvell.layers.grouped_query import GroupedQueryAttention
from kvell.layers.hyper_connections import HyperConnections, HyperEnds
from kvell.layers.part import Site
from kvell.layers.routers import HashRouter, MLPRouter, SigmoidRouter, SoftmaxRouter, SqrtSoftplusRouter
from kvell.step import Observed, Step

TOKENS, STREAMS, WIDTH = 256, 4, 64
SITE = Site(hidden_size=WIDTH, vocab_size=100, num_layers=1, norm_eps=1e-6, index=0)


def autocast() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def with_gradients(run: Callable[..., Any], *tensors: Tensor, under_autocast: bool) -> list[Tensor]:
    """What `run` makes of the tensors, and the gradients of its sum weighted by the outputs' places."""
    given = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    with torch.autocast("cpu", torch.bfloat16, enabled=under_autocast):
        made = run(*given)
    outputs = [made] if isinstance(made, Tensor) else list(made)
    places = [torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape) for output in outputs]
    sum((output * place).sum() for output, place in zip(outputs, places, strict=True)).backward()
    return [*outputs, *(tensor.grad for tensor in given if tensor.grad is not None)]


def assert_close_to_float64(run: Callable[..., Any], formula: Callable[..., Any], *tensors: Tensor) -> None:
    """Outputs and gradients under autocast, against a formula in float64, by the largest value of each."""
    exact = with_gradients(formula, *(tensor.double() for tensor in tensors), under_autocast=False)
    for mine, wanted in zip(with_gradients(run, *tensors, under_autocast=True), exact, strict=True):
        assert mine.dtype == torch.float32
        assert (mine - wanted).abs().max() <= 1e-6 * wanted.abs().max().clamp_min(1)


def numbers_of(h: Tensor, weight: Tensor) -> Tensor:
    x = h.flatten(1)
    return x / (x.square().mean(1, keepdim=True) + 1e-6).sqrt() @ weight.T


def read_formula(h: Tensor, weight: Tensor, base: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
    """As layers/hyper_connections.py states it."""
    pre, post, mix = numbers_of(h, weight).split([STREAMS, STREAMS, STREAMS**2], 1)
    base_pre, base_post, base_mix = base.split([STREAMS, STREAMS, STREAMS**2])
    mix = (scale[2] * mix + base_mix).unflatten(1, (STREAMS, STREAMS)).softmax(-1) + 1e-6
    mix = mix / (mix.sum(1, keepdim=True) + 1e-6)
    for _ in range(19):
        mix = mix / (mix.sum(2, keepdim=True) + 1e-6)
        mix = mix / (mix.sum(1, keepdim=True) + 1e-6)
    gates = (scale[0] * pre + base_pre).sigmoid() + 1e-6
    return (gates[:, :, None] * h).sum(1), 2 * (scale[1] * post + base_post).sigmoid(), mix


def write_formula(h: Tensor, y: Tensor, post: Tensor, mix: Tensor) -> Tensor:
    return post[:, :, None] * y[:, None] + (mix[:, :, :, None] * h[:, :, None]).sum(1)


@pytest.mark.parametrize("version", ["fast", "reference"])
def test_hyper_connections_are_read_and_written_in_fp32(version: Any) -> None:
    h, y = drawn(TOKENS, STREAMS, WIDTH), drawn(TOKENS, WIDTH, seed=1)
    weight = 0.02 * drawn((2 + STREAMS) * STREAMS, STREAMS * WIDTH, seed=2)
    base, scale = drawn(len(weight), seed=3), torch.ones(3)

    def read(*tensors: Tensor) -> Any:
        with kernels.use(version):
            return hyper_read(*tensors, iterations=20, eps=1e-6, norm_eps=1e-6)

    def write(*tensors: Tensor) -> Tensor:
        with kernels.use(version):
            return hyper_write(*tensors)

    assert_close_to_float64(read, read_formula, h, weight, base, scale)
    post, mix = drawn(TOKENS, STREAMS, seed=4), drawn(TOKENS, STREAMS, STREAMS, seed=5)
    assert_close_to_float64(write, write_formula, h, y, post, mix)


def test_the_last_collapse_is_computed_in_fp32() -> None:
    ends = HyperEnds(HyperConnections(streams=STREAMS), SITE)
    weight = 0.02 * drawn(STREAMS, STREAMS * WIDTH, seed=1)

    def close(h: Tensor, weight: Tensor) -> Tensor:
        return torch.func.functional_call(ends, {"weight": weight}, (h,))

    def formula(h: Tensor, weight: Tensor) -> Tensor:
        return ((numbers_of(h, weight).sigmoid() + 1e-6)[:, :, None] * h).sum(1)

    ends.forward = ends.close  # type: ignore[method-assign]
    assert_close_to_float64(close, formula, drawn(TOKENS, STREAMS, WIDTH), weight)


def routing(kind: Any) -> tuple[nn.Module, Step]:
    torch.manual_seed(0)
    router = kind.build(SITE, 64, 4)
    for parameter in router.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, 0, 0.02)
    return router, Step.of(torch.arange(TOKENS) % SITE.vocab_size, [TOKENS], None, observed=Observed())


@pytest.mark.parametrize(
    "kind",
    [SigmoidRouter(), SigmoidRouter(logit_softcap=1.0), SqrtSoftplusRouter(), HashRouter(), SoftmaxRouter(),
     MLPRouter(hidden_size=32, skip_expert="identity")],
    ids=lambda kind: kind.kind,
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_router_chooses_and_weighs_the_same_experts(kind: Any, dtype: torch.dtype) -> None:
    """Of an input in bf16 too, as a draft block's is under autocast."""
    router, step = routing(kind)
    x = drawn(TOKENS, WIDTH).to(dtype)
    with autocast():
        weights, chosen = router(x, step)
    plain_weights, plain_chosen = router(x.float(), step)
    assert torch.equal(chosen, plain_chosen)
    assert torch.equal(weights, plain_weights.to(dtype))
    gradients = []
    for made in (weights, plain_weights.to(dtype)):
        router.zero_grad()
        (made.float() * drawn(*made.shape, seed=1)).sum().backward()
        gradients.append([parameter.grad for parameter in router.parameters() if parameter.grad is not None])
    for mine, plain in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, plain, atol=1e-6 * float(plain.abs().max()), rtol=0)


def test_an_indexer_scores_in_fp32() -> None:
    query, weights, keys = drawn(TOKENS, 4, 16), drawn(TOKENS, 4, seed=1), drawn(40, 16, seed=2)

    def formula(query: Tensor, weights: Tensor, keys: Tensor) -> Tensor:
        return (weights[:, :, None] * torch.einsum("nhd,ed->nhe", query, keys).relu()).sum(1)

    assert_close_to_float64(index_scores, formula, query, weights, keys)
    with autocast():
        one = index_scores(query[:1], weights[:1], keys)
    torch.testing.assert_close(one, index_scores(query, weights, keys)[:1], atol=1e-5, rtol=0)


def test_the_mass_that_indexers_learn_from_is_fp32() -> None:
    query, rows, entries = drawn(48, 2, 16), drawn(48, 16, seed=1), drawn(12, 16, seed=2)
    visible, sink = torch.arange(1, 49) // 4, drawn(2, seed=3)
    arguments = {"scale": 1.0, "window": 8}
    with autocast():
        mine = attention_mass(query, rows, entries, visible, sink, **arguments)
        mixed = attention_mass(query.bfloat16(), rows.bfloat16(), entries, visible, sink, **arguments)
    plain = attention_mass(query, rows, entries, visible, sink, **arguments)
    assert torch.equal(mine, plain)
    rounded = attention_mass(query.bfloat16().float(), rows.bfloat16().float(), entries, visible, sink, **arguments)
    assert torch.equal(mixed, rounded)


def test_references_compute_in_fp32() -> None:
    query, rows, entries = drawn(12, 2, 16), drawn(12, 16, seed=1), drawn(3, 16, seed=2)
    visible, sink = torch.arange(1, 13) // 4, drawn(2, seed=3)

    def compressed(query: Tensor, rows: Tensor, entries: Tensor) -> Tensor:
        return compressed_attention_reference(query, rows, entries, visible, None, sink, scale=1.0, window=4)

    def full(query: Tensor, rows: Tensor) -> Tensor:
        return attention_reference(query, rows[:, None], rows[:, None], scale=1.0)

    for run, tensors in ((compressed, (query, rows, entries)), (full, (query, rows))):
        with autocast():
            mine = run(*tensors)
        assert torch.equal(mine, run(*tensors))


MODEL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "max_positions": 64,
    "connection": {"kind": "hyper", "streams": 2, "iterations": 4},
    "layers": [
        {
            "attention": {
                "kind": "grouped_query",
                "num_heads": 2,
                "num_kv_heads": 1,
                "head_dim": 16,
                "rotary": None,
                "output_gate": "per_head",
            },
            "feed_forward": {
                "kind": "mixture_of_experts",
                "num_experts": 4,
                "top_k": 2,
                "intermediate_size": 16,
                "router": {"kind": "sigmoid"},
            },
        }
    ]
    * 2,
}


def decoder(*, checkpointing: bool) -> Decoder:
    torch.manual_seed(0)
    return Decoder(resolve(MODEL, "model"), activation_checkpointing=checkpointing)


def test_an_output_gate_opens_in_fp32() -> None:
    model = decoder(checkpointing=False)
    attention = next(module for module in model.modules() if isinstance(module, GroupedQueryAttention))
    x, y = drawn(8, 32), drawn(8, 2, 16, seed=1)
    with autocast():
        gated = attention._gate(x, y)
        raw = attention.g_proj(x)
    assert torch.equal(gated, y * nn.functional.softplus(raw.float())[..., None])


@pytest.mark.parametrize("version", ["fast", "reference"])
def test_what_is_computed_again_for_the_backward_pass_runs_as_it_did(
    version: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under autocast and the chosen kernels, though both are over by then; and backward twice."""
    seen: list[tuple[str, bool]] = []
    forward = GroupedQueryAttention.forward

    def watched(self: GroupedQueryAttention, *arguments: Any, **named: Any) -> Tensor:
        seen.append((kernels.choice.chosen(), torch.is_autocast_enabled("cpu")))
        return forward(self, *arguments, **named)

    monkeypatch.setattr(GroupedQueryAttention, "forward", watched)
    model, plain = decoder(checkpointing=True), decoder(checkpointing=False)
    tokens = torch.arange(24)[None] % 64
    gradients = []
    for made in (model, plain):
        with kernels.use(version), autocast():
            loss = made(tokens).float().logsumexp(-1).sum()
        with kernels.use("reference" if version == "fast" else "fast"):
            loss.backward(retain_graph=True)
        loss.backward()
        gradients.append([parameter.grad for parameter in made.parameters()])
    assert seen == [(version, True)] * (2 + 2 + 2 + 2)
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-5)
