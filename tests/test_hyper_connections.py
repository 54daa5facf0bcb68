"""Hyper-connections: how they mix, why that cannot blow up, how they begin, what stays in fp32; and the training of
the indexer, which nothing else trains."""

import copy
import math
from typing import NamedTuple

import pytest
import torch
from oracle import DEEPSEEK_V4
from shape_checks import unchecked
from test_compressed_failures import HIDDEN, ByHand, layer_of
from torch import Tensor
from torch.nn import functional as F

import kvell
from kvell import Decoder, ModelConfig
from kvell.config import LayerConfig
from kvell.families import parse_config
from kvell.kernels.hyper_connections import sinkhorn
from kvell.layers.feed_forward import GatedMLP
from kvell.layers.grouped_query import GroupedQuery
from kvell.layers.hyper_connections import HyperConnection, HyperConnections, HyperEnds, Reading
from kvell.layers.part import Site
from kvell.layers.residual import PlainResidual
from kvell.layers.rotary import DefaultRotary
from kvell.step import Observed, Step

SITE = Site(64, 97, 1, 1e-6, 0)


def random_(module: torch.nn.Module, spread: float = 1.0) -> None:
    """Weights with which the numbers read off a token's streams have about this deviation."""
    with torch.no_grad():
        module.weight.normal_(0, spread * module.weight.shape[1] ** -0.5)
        module.base.normal_(0, 0.5)
        module.scale.uniform_(0.6, 1.4)


# Mixing


def sinkhorn_by_hand(logits: list[list[float]], iterations: int, eps: float) -> list[list[float]]:
    """One matrix in Python floats: softmax of rows, + eps, columns; then rows and columns, iterations - 1 times."""
    n = len(logits)
    mix = [[math.exp(x) / sum(math.exp(y) for y in row) + eps for x in row] for row in logits]

    def by_rows() -> None:
        for row in mix:
            total = sum(row) + eps
            row[:] = [x / total for x in row]

    def by_columns() -> None:
        totals = [sum(row[k] for row in mix) + eps for k in range(n)]
        for row in mix:
            row[:] = [x / total for x, total in zip(row, totals, strict=True)]

    by_columns()
    for _ in range(iterations - 1):
        by_rows()
        by_columns()
    return mix


@pytest.mark.parametrize("streams", [1, 2, 4, 5])
@pytest.mark.parametrize(("iterations", "eps"), [(1, 1e-6), (2, 1e-6), (3, 1e-2), (20, 1e-6)])
def test_sinkhorn_is_columns_first_and_columns_last(streams: int, iterations: int, eps: float) -> None:
    """Megatron 5106: the order of rows and columns. With few iterations it shows, as neither has converged."""
    logits = torch.randn(30, streams, streams, dtype=torch.float64) * 2
    ours = sinkhorn(logits.float(), iterations, eps)
    wanted = torch.tensor([sinkhorn_by_hand(one, iterations, eps) for one in logits.tolist()])
    torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-6)
    other_order = sinkhorn(logits.mT.float(), iterations, eps).mT
    if streams > 1 and iterations < 4:
        assert (other_order - wanted).abs().max() > 1e-2


def test_a_sinkhorn_mix_has_rows_and_columns_that_sum_to_one() -> None:
    mix = sinkhorn(torch.randn(500, 4, 4), 20, 1e-6)
    assert (mix > 0).all()
    for dim in (-1, -2):
        torch.testing.assert_close(mix.sum(dim), torch.ones(500, 4), rtol=0, atol=1e-3)


def connection(streams: int = 4, constrained: bool = True, block: int = 0) -> HyperConnection:
    return HyperConnections(streams=streams, constrained=constrained).build(SITE, block)


def test_the_first_index_of_a_mix_is_the_stream_that_is_read() -> None:
    """NeMo 2154: the mix transposed, a divergence of 0.265 instead of 0.038. By hand: of streams 1, 10 and 100, the
    new stream 0 is all of stream 2, the new streams 1 and 2 are half of each of the first two."""
    h = torch.tensor([1.0, 10.0, 100.0])[None, :, None].expand(1, 3, 64)
    mix = torch.tensor([[[0.0, 0.5, 0.5], [0.0, 0.5, 0.5], [1.0, 0.0, 0.0]]])
    reading = Reading(torch.tensor([[0.0, 2.0, 1.0]]), mix)
    new = connection(3).write(h, torch.full((1, 64), 1000.0), reading)
    assert new[0, :, 0].tolist() == [100.0, 5.5 + 2000.0, 5.5 + 1000.0]


@torch.no_grad()
def test_a_base_that_sends_each_stream_on_to_the_next_does_so() -> None:
    """The same from the weights: large numbers at [j, j + 1] of the last N x N rows move stream j to stream j + 1."""
    one = connection(4)
    one.weight.zero_()
    one.base.zero_()
    one.base[8:].view(4, 4)[[0, 1, 2, 3], [1, 2, 3, 0]] = 30.0
    h = torch.randn(5, 4, 64)
    x, reading = one.read(h)
    torch.testing.assert_close(one.write(h, torch.zeros(5, 64), reading), h.roll(1, dims=1), rtol=0, atol=1e-3)
    torch.testing.assert_close(x, h.sum(1) / 2, rtol=0, atol=1e-4)  # every stream by sigmoid(0)


@pytest.mark.parametrize("streams", [1, 2, 4])
@torch.no_grad()
def test_reading_and_writing_follow_the_formulas(streams: int) -> None:
    """Token by token in float64."""
    one, h, y = connection(streams), torch.randn(6, streams, 64) * 3, torch.randn(6, 64)
    random_(one)
    h[0], h[1] = 0, h[1] * 1e-3  # where eps counts
    x, reading = one.read(h)
    new = one.write(h, y, reading)
    weight, base, scale = (tensor.double() for tensor in (one.weight, one.base, one.scale))
    for t in range(6):
        flat = h[t].double().flatten()
        numbers = weight @ (flat / (flat.square().mean() + 1e-6).sqrt())
        pre = (numbers[:streams] * scale[0] + base[:streams]).sigmoid() + 1e-6
        post = 2 * (numbers[streams : 2 * streams] * scale[1] + base[streams : 2 * streams]).sigmoid()
        logits = (numbers[2 * streams :] * scale[2] + base[2 * streams :]).view(streams, streams)
        mix = sinkhorn_by_hand(logits.tolist(), 20, 1e-6)
        wanted_x = sum(pre[j] * h[t, j].double() for j in range(streams))
        torch.testing.assert_close(x[t].double(), wanted_x, rtol=1e-5, atol=1e-5)
        for k in range(streams):
            kept = sum(mix[j][k] * h[t, j].double() for j in range(streams))
            torch.testing.assert_close(new[t, k].double(), post[k] * y[t].double() + kept, rtol=1e-5, atol=1e-5)


# Depth


def gains_over(layers: int, constrained: bool) -> tuple[float, float]:
    """Of the product of so many layers' mixes, for random tokens: the largest sum of a row's and of a column's sizes,
    which bound how much a signal going forwards and a gradient going backwards can grow."""
    product = torch.eye(4, dtype=torch.float64).expand(64, 4, 4)
    for layer in range(layers):
        one = connection(4, constrained, layer)
        random_(one)
        if not constrained:  # about the identity, as they are initialised
            with torch.no_grad():
                one.base[8:].add_(torch.eye(4).flatten())
        _, reading = one.read(torch.randn(64, 4, 64))
        product = product @ reading.mix.detach().double()
    return tuple(float(product.abs().sum(dim).max()) for dim in (-1, -2))  # type: ignore[return-value]


def test_the_mixes_of_64_layers_together_neither_grow_nor_shrink_a_signal() -> None:
    """A product of doubly stochastic matrices is doubly stochastic: arXiv 2512.24880, section 4.1."""
    for gain in gains_over(64, constrained=True):
        assert abs(gain - 1) < 0.05


def test_unconstrained_mixes_of_64_layers_do() -> None:
    for gain in gains_over(64, constrained=False):
        assert gain > 1.05


# The beginning of training


def config(connection: object) -> ModelConfig:
    attention = GroupedQuery(num_heads=4, num_kv_heads=2, head_dim=16, rotary=DefaultRotary(theta=100.0))
    layer = LayerConfig(attention=attention, feed_forward=GatedMLP(intermediate_size=48))
    return ModelConfig(vocab_size=97, hidden_size=64, max_positions=256, layers=(layer,) * 4, connection=connection)


@pytest.mark.parametrize("constrained", [True, False])
@torch.no_grad()
def test_a_fresh_model_is_one_with_a_plain_residual(constrained: bool) -> None:
    """All streams begin as the embedding; each block reads a multiple of it, and adds its output once to each."""
    hyper = Decoder(config(HyperConnections(constrained=constrained)))
    plain = Decoder(config(PlainResidual()))
    weights = {name: tensor for name, tensor in hyper.state_dict().items() if name in plain.state_dict()}
    plain.load_state_dict(weights)
    tokens = torch.randint(0, 97, (1, 30))
    wanted = plain(tokens)
    assert (hyper(tokens) - wanted).norm() < 0.01 * wanted.norm()


@pytest.mark.parametrize("streams", [2, 4])
@torch.no_grad()
def test_a_fresh_block_reads_its_home_stream_and_writes_to_all(streams: int) -> None:
    """From the initial bases: sigmoid(3) = 0.953 of the home, sigmoid(-3) = 0.047 of the others; 2 sigmoid(0) = 1 of
    the output to each; and a mix of softmax(3, -3, ...) = 0.9926 and 0.0025. The gating scales of 0.01 keep what
    depends on the token far below that."""
    model = Decoder(config(HyperConnections(streams=streams)))
    frames = [frame for layer in model.layers for frame in (layer.attention_frame, layer.feed_forward_frame)]
    homes = []
    h = torch.randn(50, streams, 64)
    for frame in frames:
        one = frame.connection
        assert one.scale.tolist() == pytest.approx([0.01] * 3)
        _, reading = one.read(h)
        share = torch.stack([one.read(F.pad(h[:, j : j + 1], (0, 0, j, streams - j - 1)))[0] for j in range(streams)])
        share = (share / h.transpose(0, 1)).mean((1, 2))  # read of each stream where the others are zero
        homes.append(int(share.argmax()))
        expected = torch.full((streams,), 1 / (1 + math.exp(3)))
        expected[homes[-1]] = 1 / (1 + math.exp(-3))
        torch.testing.assert_close(share, expected, rtol=0, atol=0.01)
        torch.testing.assert_close(reading.post, torch.ones(50, streams), rtol=0, atol=0.01)
        torch.testing.assert_close(reading.mix, torch.eye(streams).expand(50, -1, -1), rtol=0, atol=0.01)
    assert set(homes) == set(range(streams)), "every stream is some block's home"
    # The last collapse weighs all alike: sigmoid(0) each.
    ends = model.ends
    assert isinstance(ends, HyperEnds)
    assert ends.scale.tolist() == pytest.approx([0.01])
    torch.testing.assert_close(ends.close(h), h.sum(1) / 2, rtol=0, atol=0.1)


# Precision


def released_like(**fields: object) -> Decoder:
    """Window, CSA and HCA layers, hash and learned routing, a draft block."""
    small = {"hidden_size": 16, "compress_ratios": [0, 4, 128, 4, 0], "num_hash_layers": 1}
    return Decoder(parse_config(DEEPSEEK_V4 | small | fields))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_must_not_be_rounded_stays_in_fp32(dtype: torch.dtype) -> None:
    model = released_like()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    exact = {name: tensor.clone() for name, tensor in model.named_tensors()}
    kept = ("connection.weight", "connection.base", "connection.scale", "sink", "position_bias", "selection_bias")
    ends = {f"{owner}ends.{part}" for owner in ("", "draft_block.") for part in ("weight", "base", "scale")}
    model.to(dtype)
    count = 0
    for name, tensor in model.named_tensors():
        if name.endswith(kept) or name in ends:
            count += 1
            assert tensor.dtype == torch.float32, name
            assert torch.equal(tensor, exact[name]), name
        else:
            assert tensor.dtype == (torch.int64 if name.endswith("router.table") else dtype), name
    # 5 layers with two connections and a sink, 4 with learned routing; 3 compressors and 2 indexers'; 2 ends.
    assert count == 5 * (2 * 3 + 1) + 4 + 3 + 2 + 2 * 3
    logits = model(torch.randint(0, 97, (1, 9)))
    assert logits.dtype == dtype
    assert logits.isfinite().all()


def test_streams_are_kept_in_the_models_dtype() -> None:
    _, streams = released_like().to(torch.bfloat16)(torch.randint(0, 97, (1, 9)), return_streams=True)
    assert (streams.shape, streams.dtype) == ((1, 9, 4, 16), torch.bfloat16)


# The indexer


def indexers(model: Decoder) -> dict[str, torch.nn.Parameter]:
    return {name: one for name, one in model.named_parameters() if ".indexer." in name}


def batch() -> Tensor:
    return torch.randint(0, 97, (4, 40))


def sharp(model: Decoder) -> Decoder:
    """Fresh matrices are so small that attention goes everywhere alike, and there would be nothing to learn."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "connection" not in name:
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
    return model


class Training(NamedTuple):
    """Before and after a few dozen steps of index_loss on a fixed batch, the optimiser given every parameter."""

    before: Decoder
    after: Decoder
    tokens: Tensor
    losses: list[float]


@pytest.fixture(scope="module")
def training() -> Training:
    with torch.random.fork_rng(), unchecked():
        torch.manual_seed(0)
        before, tokens = sharp(released_like(index_topk=2)), torch.randint(0, 97, (3, 36))
        after, losses = copy.deepcopy(before), []
        optimiser = torch.optim.Adam(after.parameters(), lr=0.01)
        for _ in range(40):
            optimiser.zero_grad()
            loss = after.index_loss(tokens)
            loss.backward()
            optimiser.step()
            losses.append(float(loss.detach()))
        return Training(before, after, tokens, losses)


def test_training_the_indexers_lowers_their_loss_and_moves_nothing_else(training: Training) -> None:
    assert training.losses[-1] < 0.5 * training.losses[0]
    before = dict(training.before.named_parameters())
    moved = {name for name, one in training.after.named_parameters() if not torch.equal(one, before[name])}
    assert moved == set(indexers(training.after))
    assert moved, "there must be an indexer to train"


@torch.no_grad()
def test_a_trained_indexer_finds_where_attention_goes(training: Training) -> None:
    """The loss is for something: with two picks a query the logits come nearer to those of a model that attends to
    every entry."""
    everything = released_like(index_topk=100)
    everything.load_state_dict(training.before.state_dict())
    wanted = everything(training.tokens)
    before, after = ((model(training.tokens) - wanted).norm() for model in (training.before, training.after))
    assert after < 0.9 * before


@torch.no_grad()
def test_the_index_loss_is_the_divergence_from_where_the_attention_of_all_heads_goes() -> None:
    """KL(p || softmax(scores)) over the visible entries, p the heads' weights of them together, added up and made to
    sum to 1, where no entry is left out (arXiv 2512.02556, equation 3); the mean over queries that see one."""
    layer, x = layer_of("sparse"), torch.randn(30, HIDDEN)
    step = Step.of(torch.zeros(30, dtype=torch.long), [30], None)
    step.observed = Observed()
    layer(x, step)
    hand = ByHand(layer, x)
    divergences = []
    for t, scores in enumerate(hand.index_scores()):
        if visible := hand.visible[t]:
            seen = torch.cat([hand.window(t), hand.entries[:visible]])
            mass = hand.attention(t, seen)[:, -visible:].sum(0)
            p, q = mass / mass.sum(), scores[:visible].softmax(0)
            divergences.append((p * (p / q).log()).sum())
    (loss,) = step.observed.index_losses.values()
    assert len(divergences) == 30 - 3
    assert loss > 0.01
    torch.testing.assert_close(loss.double(), torch.stack(divergences).mean(), rtol=1e-4, atol=0)


def test_the_index_loss_has_no_gradient_for_anything_but_indexers() -> None:
    model = released_like()
    model.index_loss(batch()).backward()
    learning = {name for name, one in model.named_parameters() if one.grad is not None}
    assert learning == set(indexers(model))


def test_the_models_loss_has_no_gradient_for_indexers() -> None:
    model = released_like(compress_ratios=[0, 4, 4, 0, 0], num_nextn_predict_layers=0)  # 128 tokens would be many
    model(batch()).logsumexp(-1).mean().backward()
    assert all(one.grad is None for one in indexers(model).values())
    trained = [one for layer in model.layers for name, one in layer.named_parameters() if ".indexer." not in name]
    assert all(one.grad is not None for one in trained if one.requires_grad)


def test_a_model_without_an_indexer_has_no_such_loss() -> None:
    model = released_like(compress_ratios=[0, 128, 128, 0, 0])
    with pytest.raises(kvell.InputError, match="no indexer"):
        model.index_loss(batch())


def test_a_query_whose_heads_all_look_elsewhere_leaves_the_indexers_gradients_finite() -> None:
    """A sink so heavy that every entry's weight is zero in fp32: there is nothing to learn from, and no 0 / 0."""
    model = released_like()
    with torch.no_grad():
        for layer in model.layers:
            layer.attention.sink.fill_(110.0)
    loss = model.index_loss(batch())
    loss.backward()
    assert loss == 0
    assert all(one.grad is None or one.grad.isfinite().all() for one in model.parameters())


@pytest.mark.parametrize("streams", [2, 3, 4])
def test_every_stream_is_some_blocks_home(streams: int) -> None:
    config = released_like().config
    connection = config.connection.model_copy(update={"streams": streams})
    model = Decoder(config.model_copy(update={"connection": connection}))
    frames = [frame for layer in model.layers for frame in (layer.attention_frame, layer.feed_forward_frame)]
    blocks = [frame.connection for frame in frames]
    homes = [int(block.base[:streams].argmax()) for block in blocks]
    assert homes == [index % streams for index in range(len(blocks))]
