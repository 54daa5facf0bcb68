"""Gradients are those of the formulas: every technique's against differences of its own values, in float64.

The code computes norms, scores, connections and rotary angles in fp32, too coarse for differences. A fixture here has
these casts leave float64 alone, so that what is checked is the code itself: `.float()`, `.softmax(dtype=float32)` and
the dtype of rotary tables. That the casts themselves pass gradients on, test_house_rule.py and test_mixing.py see.

Choices (experts, picks) have no gradient. A difference that crossed over from one choice to another would make a
check fail; where choices are made, it is also checked that they were the same throughout.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from shape_checks import unchecked
from torch import Tensor, nn
from torch.autograd import gradcheck

import kvell.layers.compressor
import kvell.layers.indexer
import kvell.step
from kvell import kernels
from kvell.kernels import attention as attention_kernels
from kvell.kernels import compressed as compressed_kernels
from kvell.kernels.compressed import pick
from kvell.kernels.experts import experts_gathered, experts_grouped, experts_indexed, experts_reference
from kvell.kernels.hyper_connections import sinkhorn
from kvell.layers import routers
from kvell.layers.compressed import Compressed
from kvell.layers.compressor import Compressor, EntryCompressor
from kvell.layers.convolutional import Convolutional
from kvell.layers.experts import DenseBesideExperts, MixtureOfExperts
from kvell.layers.feed_forward import GatedMLP, GatedUnit
from kvell.layers.grouped_query import GroupedQuery
from kvell.layers.hyper_connections import HyperConnections
from kvell.layers.indexer import EntryIndexer, Indexer
from kvell.layers.key_values import KEY_VALUES
from kvell.layers.norms import RMSNorm
from kvell.layers.part import Site
from kvell.layers.per_layer_embedding import PerLayerEmbedding
from kvell.layers.residual import ScaledResidual
from kvell.layers.rotary import DefaultRotary, ProportionalRotary, YarnRotary, rotary_table
from kvell.layers.routers import HashRouter, MLPRouter, SigmoidRouter, SoftmaxRouter, SqrtSoftplusRouter
from kvell.step import Observed, Step

HIDDEN, VOCAB = 6, 11
SITE = Site(HIDDEN, VOCAB, num_layers=2, norm_eps=1e-6, index=0)
PLAIN = DefaultRotary(theta=100.0)
TURNED = YarnRotary(theta=100.0, factor=4.0, original_positions=8, attention_factor=1.0)
versions = pytest.mark.parametrize("version", ["fast", "reference"])


@pytest.fixture(autouse=True)
def _float64_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Casts to fp32 within the code leave float64 as it is."""
    to_float, softmax = Tensor.float, Tensor.softmax

    def same(x: Tensor) -> Tensor:
        return x if x.dtype == torch.float64 else to_float(x)

    def softmax_of_same(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return softmax(x, *args, **(kwargs | {"dtype": x.dtype} if x.dtype == torch.float64 else kwargs))

    def table(rotary: Any, head_dim: int, positions: Tensor, dtype: torch.dtype) -> Any:
        return rotary_table(rotary, head_dim, positions, torch.float64)

    monkeypatch.setattr(Tensor, "float", same)
    monkeypatch.setattr(Tensor, "softmax", softmax_of_same)
    monkeypatch.setattr(kvell.step, "rotary_table", table)
    monkeypatch.setattr(kvell.layers.compressor, "rotary_table", table)


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).requires_grad_()


def double(module: nn.Module) -> Any:
    """The module with random float64 parameters, those too that keep fp32 through `.double()`."""
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, dtype=torch.float64) * 0.5
    for buffer in module.buffers():
        if buffer.is_floating_point():
            buffer.data = torch.randn(buffer.shape, dtype=torch.float64) * 0.1
    return module


def learnt(module: nn.Module) -> list[Tensor]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def step_of(*counts: int, sources: frozenset[tuple[int, str]] = frozenset()) -> Step:
    """A step without a cache: gradients are recorded."""
    return Step.of(torch.arange(sum(counts)) % VOCAB, list(counts), None, sources, Observed())


def check(function: Callable[..., Any], *inputs: Tensor) -> None:
    """The gradients of all inputs, a module's parameters among them: it sees the differences made to them."""
    assert all(one.dtype == torch.float64 and one.requires_grad for one in inputs)
    outputs = function(*inputs)
    assert all(one.dtype == torch.float64 for one in (outputs if isinstance(outputs, tuple) else (outputs,)))
    with unchecked():
        assert gradcheck(function, inputs)


def check_module(module: nn.Module, function: Callable[[Tensor], Any], x: Tensor) -> None:
    check(lambda x, *_: function(x), x, *learnt(module))


def assert_choices_hold(choices: list[Tensor]) -> None:
    """All choices that were made while differences were taken are the same ones."""
    assert len(choices) > 1
    assert all(torch.equal(one, choices[0]) for one in choices)


# Kernels.


@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize(("queries", "rows"), [(1, 5), (4, 4), (5, 7)])
@pytest.mark.parametrize("run", [attention_kernels.attention_blocked, attention_kernels.attention_reference])
def test_attention_of_grouped_heads(
    run: Callable[..., Tensor], queries: int, rows: int, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """4 query heads on 2 KV heads; several blocks of queries."""
    monkeypatch.setattr(attention_kernels, "QUERY_BLOCK", 2)
    check(
        lambda q, k, v: run(q, k, v, scale=0.7, window=window),
        randn(queries, 4, 3),
        randn(rows, 2, 3),
        randn(rows, 2, 3),
    )


@pytest.mark.parametrize("window", [None, 2])
def test_attention_of_sequences_of_one_length_at_once(window: int | None) -> None:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention_kernels.attention(q, k.split(3), v.split(3), [3, 3], scale=0.7, window=window)

    check(run, randn(6, 4, 2), randn(6, 2, 2), randn(6, 2, 2))


PICKS = torch.tensor([[0, -1], [1, 4], [0, 3], [2, 10]])


@pytest.mark.parametrize(
    ("entries", "picks"),
    [(0, None), (4, None), (5, PICKS.clamp_max(4)), (11, PICKS)],
    ids=["window only", "every entry", "picks by a mask", "picks gathered"],
)
@pytest.mark.parametrize(
    "run", [compressed_kernels.compressed_attention_blocked, compressed_kernels.compressed_attention_reference]
)
def test_attention_over_a_window_and_entries(
    run: Callable[..., Tensor], entries: int, picks: Tensor | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two blocks of queries; beyond 4 entries for a pick they are gathered."""
    monkeypatch.setattr(compressed_kernels, "MAX_BLOCK", 3)
    visible = torch.tensor([1, 1, 2, 4]).clamp_max(entries) if picks is None else torch.tensor([1, 5, 5, entries])
    gathered = picks is not None and entries > compressed_kernels.GATHER_FROM * picks.shape[1]
    assert gathered == (entries == 11)
    check(
        lambda q, r, e, s: run(q, r, e, visible, picks, s, scale=0.7, window=3),
        randn(4, 2, 3),
        randn(6, 3),
        randn(entries, 3),
        randn(2),
    )


@pytest.mark.parametrize("limit", [None, 0.8])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("run", [experts_gathered, experts_grouped, experts_indexed, experts_reference])
def test_experts(run: Callable[..., Tensor], activation: Any, limit: float | None) -> None:
    """An expert that nobody chose, and a choice of none."""
    chosen = torch.tensor([[0, 2], [2, 1], [4, 0], [1, 4]])
    unit = GatedUnit(activation, limit)
    check(
        lambda x, w, up, down: run(x, w, chosen, up, down, unit),
        randn(4, 3),
        randn(4, 2),
        randn(4, 4, 3),
        randn(4, 3, 2),
    )


# Norms, rotary embeddings, connections.


@pytest.mark.parametrize("weighted", [True, False])
def test_rms_norm(weighted: bool) -> None:
    norm = double(RMSNorm(5, 1e-6, weighted=weighted))
    check_module(norm, norm, randn(3, 2, 5))


@pytest.mark.parametrize(
    "rotary",
    [PLAIN, DefaultRotary(theta=100.0, fraction=0.5), ProportionalRotary(theta=100.0, fraction=0.5), TURNED],
    ids=["default", "half", "proportional", "yarn"],
)
def test_rotary_embedding(rotary: Any) -> None:
    table = rotary_table(rotary, 8, torch.tensor([0, 1, 9]), torch.float64)
    for turn in (table.rotate, table.rotate_last, table.inverse().rotate_last):
        check(turn, randn(3, 2, 8))


def test_scaled_residual() -> None:
    connection = double(ScaledResidual().build(SITE, 0))
    check(lambda h, y, *_: connection.write(h, y, None), randn(3, HIDDEN), randn(3, HIDDEN), *learnt(connection))
    ends = double(ScaledResidual().build_ends(SITE))
    check_module(ends, lambda x: ends.close(ends.open(x)), randn(3, HIDDEN))


@pytest.mark.parametrize("iterations", [1, 2, 20])
def test_sinkhorn(iterations: int) -> None:
    check(lambda logits: sinkhorn(logits, iterations, 1e-6), randn(2, 3, 3))


@pytest.mark.parametrize("constrained", [True, False])
def test_hyper_connections(constrained: bool) -> None:
    config = HyperConnections(streams=2, iterations=3, constrained=constrained)
    connection, ends = double(config.build(SITE, 0)), double(config.build_ends(SITE))

    def through(h: Tensor, *_: Tensor) -> Tensor:
        x, reading = connection.read(h)
        return connection.write(h, x.sin(), reading)

    check(through, randn(2, 2, HIDDEN), *learnt(connection))
    check_module(ends, ends.close, randn(2, 2, HIDDEN))
    check(ends.open, randn(2, HIDDEN))


# Attention layers: over two sequences, through their input and all their weights.


@versions
@pytest.mark.parametrize("window", [None, 2])
def test_grouped_query_layer(window: int | None, version: Any) -> None:
    config = GroupedQuery(
        num_heads=2,
        num_kv_heads=1,
        head_dim=4,
        rotary=PLAIN,
        sliding_window=window,
        output_gate="per_head",
        bias=True,
    )
    layer = double(config.build(SITE))
    with kernels.use(version):
        check_module(layer, lambda x: layer(x, step_of(3, 2)), randn(5, HIDDEN))


@versions
@pytest.mark.parametrize("kernel", [1, 2, 3])
def test_convolutional_layer(kernel: int, version: Any) -> None:
    """A sequence longer than the kernels reach, and one that is shorter."""
    config = Convolutional(
        num_heads=2, num_kv_heads=1, head_dim=4, rotary=PLAIN, depthwise_kernel=kernel, grouped_kernel=2, bias=True
    )
    layer = double(config.build(SITE))
    with kernels.use(version):
        check_module(layer, lambda x: layer(x, step_of(4, 1)), randn(5, HIDDEN))


COMPRESSED = Compressed(
    num_heads=2,
    head_dim=4,
    sliding_window=2,
    rotary=TURNED,
    rotary_width=2,
    query_rank=3,
    output_groups=2,
    output_rank=2,
)
COMPRESSOR = Compressor(ratio=2, overlap=True)
EVERY_ENTRY = COMPRESSED.model_copy(update={"compressor": COMPRESSOR})
SPARSE = EVERY_ENTRY.model_copy(update={"indexer": Indexer(num_heads=2, head_dim=2, top_k=1)})


@versions
@pytest.mark.parametrize("config", [COMPRESSED, EVERY_ENTRY], ids=["window only", "every entry"])
def test_compressed_layer(config: Compressed, version: Any) -> None:
    layer = double(config.build(SITE))
    with kernels.use(version):
        check_module(layer, lambda x: layer(x, step_of(5, 2)), randn(7, HIDDEN))


@versions
@pytest.mark.parametrize(
    ("source", "reader"),
    [
        (GroupedQuery(num_heads=1, num_kv_heads=1, head_dim=4, rotary=PLAIN), Convolutional),
        (Convolutional(num_heads=1, num_kv_heads=1, head_dim=4, rotary=PLAIN), GroupedQuery),
    ],
    ids=["convolutional of grouped-query", "grouped-query of convolutional"],
)
def test_a_layer_that_reads_anothers_keys(source: Any, reader: Any, version: Any) -> None:
    """The gradient of the input flows back through the source's keys and values, too."""
    config = reader(num_heads=2, num_kv_heads=1, head_dim=4, rotary=PLAIN, kv_source=0)
    first, layer = double(source.build(SITE)), double(config.build(SITE))

    def run(x: Tensor, *_: Tensor) -> Tensor:
        step = step_of(4, 1, sources=frozenset({(0, KEY_VALUES)}))
        return first(x, step) + layer(x.cos(), step)

    with kernels.use(version):
        check(run, randn(5, HIDDEN), *learnt(first), *learnt(layer))


def test_a_layer_that_reads_anothers_entries() -> None:
    reader = EVERY_ENTRY.model_copy(update={"kv_source": 0})
    first, layer = double(EVERY_ENTRY.build(SITE)), double(reader.build(SITE))

    def run(x: Tensor, *_: Tensor) -> Tensor:
        step = step_of(5, 1, sources=frozenset({(0, KEY_VALUES)}))
        return first(x, step) + layer(x.cos(), step)

    check(run, randn(6, HIDDEN), *learnt(first), *learnt(layer))


@pytest.mark.parametrize("overlap", [False, True])
def test_compressor(overlap: bool) -> None:
    """A sequence of two windows and a rest, one with no complete window, one with one."""
    rotary_width = 2
    compressor = double(
        EntryCompressor(Compressor(ratio=2, overlap=overlap), SITE, "entry", 3, TURNED, rotary_width, None)
    )
    check_module(
        compressor, lambda x: torch.cat(compressor.entries(compressor(x), step_of(5, 1, 2))), randn(8, HIDDEN)
    )


# The indexer.


def test_the_indexers_loss() -> None:
    """Against wanted weights that are given; some of them nothing. Of the third sequence no query sees an entry."""
    indexer = double(EntryIndexer(Indexer(num_heads=2, head_dim=4, top_k=1), COMPRESSOR, SITE, 3, TURNED, 2, None))
    masses = [torch.rand(count, entries, dtype=torch.float64) for count, entries in ((6, 3), (3, 1), (1, 0))]
    masses[0][:, 1] = 0

    def run(x: Tensor, low_rank: Tensor, *_: Tensor) -> Tensor:
        step = step_of(6, 3, 1)
        visible = ((step.positions + 1) // COMPRESSOR.ratio).split(step.counts)
        unseen = [torch.arange(m.shape[1]) >= seen[:, None] for m, seen in zip(masses, visible, strict=True)]
        own = [m.masked_fill(none, 0) for m, none in zip(masses, unseen, strict=True)]
        questions = indexer(x, low_rank, step.rotary(TURNED, 2, torch.float32))
        entries = indexer.compressor.entries(indexer.compressor(x), step)
        return indexer.loss(questions, entries, visible, own, step)

    check(run, randn(10, HIDDEN), randn(10, 3), *learnt(indexer))


@versions
def test_a_sparse_layer_and_its_indexers_loss(version: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The layer through its weights with the picks that it makes itself; the indexer's weights, which its output has
    no gradient for, through the loss."""
    layer, x = double(SPARSE.build(SITE)), torch.randn(9, HIDDEN, dtype=torch.float64)
    own = list(layer.indexer.parameters())
    picks = list[Tensor]()

    def picked(*given: Any) -> Tensor:
        picks.append(pick(*given))
        return picks[-1]

    monkeypatch.setattr(kvell.layers.indexer, "pick", picked)
    others = [parameter for name, parameter in layer.named_parameters() if not name.startswith("indexer")]

    def loss(*_: Tensor) -> Tensor:
        step = step_of(7, 2)
        layer(x, step)
        assert step.observed is not None
        return step.observed.index_losses[0]

    with kernels.use(version):
        check(lambda *_: layer(x, step_of(7, 2)), *others)
        assert_choices_hold(picks)
        check(loss, *own)
        assert torch.autograd.grad(layer(x, step_of(7, 2)).sum(), own, allow_unused=True) == (None,) * len(own)


# Routers and feed-forwards.

ROUTERS = {
    "sigmoid": SigmoidRouter(logit_softcap=2.0),
    "sqrt_softplus": SqrtSoftplusRouter(),
    "hash": HashRouter(),
    "softmax": SoftmaxRouter(),
    "mlp": MLPRouter(hidden_size=4, skip_expert="identity"),
}
every_router = pytest.mark.parametrize("router", ROUTERS.values(), ids=ROUTERS)


@every_router
def test_a_routers_weights(router: Any) -> None:
    module, choices = double(router.build(SITE, 4, 2)), list[Tensor]()

    def weights(x: Tensor) -> Tensor:
        given, chosen = module(x, step_of(3, 2))
        choices.append(chosen)
        return given

    check_module(module, weights, randn(5, HIDDEN))
    assert_choices_hold(choices)


def test_a_router_that_adds_an_earlier_state() -> None:
    """Through the earlier state as well."""
    first = double(MLPRouter(hidden_size=4).build(SITE, 4, 2))
    module, choices = double(MLPRouter(hidden_size=4, state_source=0).build(SITE, 4, 2)), list[Tensor]()

    def weights(x: Tensor, *_: Tensor) -> Tensor:
        step = step_of(3, 2, sources=frozenset({(0, routers.ROUTER_STATE)}))
        first(x, step)
        given, chosen = module(x.cos(), step)
        choices.append(chosen)
        return given

    given = [one for name, one in first.named_parameters() if name.startswith("down_proj")]
    check(weights, randn(5, HIDDEN), *given, *learnt(module))
    assert_choices_hold(choices)


@pytest.mark.parametrize("name", sorted(set(ROUTERS) - {"hash"}))
def test_a_routers_balance_loss(name: str) -> None:
    """A hash router's loads are nobody's to balance."""
    router: Any = ROUTERS[name]
    module, loads = double(router.build(SITE, 4, 2)), list[Tensor]()
    reached = [one for weight, one in module.named_parameters() if one.requires_grad and weight != "expert_scale"]

    def loss(x: Tensor, *_: Tensor) -> Tensor:
        step = step_of(3, 2)
        module(x, step)
        assert step.observed is not None
        loads.append(step.observed.expert_loads[0])
        return step.observed.balance_losses[0]

    check(loss, randn(5, HIDDEN), *reached)
    assert_choices_hold(loads)


def test_the_balance_loss_by_its_scores() -> None:
    chosen = torch.tensor([[0, 1], [1, 2], [1, 0]])

    def loss(scores: Tensor) -> Tensor:
        step = step_of(3)
        routers.observe(step, 0, scores.exp(), chosen)
        assert step.observed is not None
        return step.observed.balance_losses[0]

    check(loss, randn(3, 4))


@versions
@every_router
def test_a_mixture_of_experts(router: Any, version: Any) -> None:
    """Choices are checked above; here the gradient comes through the experts and the weights together."""
    config = MixtureOfExperts(
        num_experts=3, top_k=2, intermediate_size=2, shared_intermediate_size=2, router=router, routed_scale=1.5
    )
    module = double(config.build(SITE))
    with kernels.use(version):
        check_module(module, lambda x: module(x, step_of(3)), randn(3, HIDDEN))


def test_a_dense_feed_forward_beside_experts() -> None:
    mixture = MixtureOfExperts(num_experts=3, top_k=2, intermediate_size=2, router=SoftmaxRouter())
    module = double(DenseBesideExperts(dense=GatedMLP(intermediate_size=3), mixture=mixture).build(SITE))
    check_module(module, lambda x: module(x, step_of(3)), randn(3, HIDDEN))


def test_per_layer_embeddings() -> None:
    config = PerLayerEmbedding(width=3)
    inputs, injection = double(config.build_inputs(SITE)), double(config.build(SITE))
    step = Step.of(torch.tensor([3, 0, 3, 10]), [4], None)
    check_module(inputs, lambda embedded: inputs(embedded, step), randn(4, HIDDEN))
    check(lambda h, own, *_: injection(h, own), randn(4, HIDDEN), randn(4, 3), *learnt(injection))
