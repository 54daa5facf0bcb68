"""What went wrong in other implementations of DeepSeek V4, by the number of the public report, and does not here.

Three more stand elsewhere, beside what they are about: a transposed mix and the order of Sinkhorn's steps in
test_hyper_connections.py, a Hadamard transform of one side only in test_released_rounding.py.
"""

import math
from pathlib import Path

import pytest
import torch
from oracle import DEEPSEEK_V4
from shape_checks import unchecked
from torch import Tensor

from kvell import Cache, Decoder, ModelConfig, kernels
from kvell.config import LayerConfig
from kvell.families import parse_config
from kvell.layers.compressed import Compressed, CompressedAttention
from kvell.layers.compressor import Compressor
from kvell.layers.experts import MixtureOfExperts
from kvell.layers.feed_forward import GatedMLP
from kvell.layers.indexer import Indexer
from kvell.layers.part import Site
from kvell.layers.rotary import DefaultRotary, YarnRotary
from kvell.layers.routers import SqrtSoftplusRouter
from kvell.step import Step

VOCAB, HIDDEN = 97, 32
YARN = YarnRotary(theta=50.0, factor=16.0, original_positions=16, attention_factor=1.0)
EPS = 1e-6


def lively(module: torch.nn.Module) -> torch.nn.Module:
    """Random weights of the size of what they multiply: nothing is so small that it could be left out unnoticed."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            if not tensor.is_floating_point():
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            if tensor.dim() > 1 and not name.endswith("position_bias"):
                tensor.copy_(noise * tensor.shape[-1] ** -0.5)
            else:
                tensor.copy_(0.5 * noise + name.endswith(("norm.weight", "scale")))
    return module.eval()


def tokens_of(count: int, seed: int = 0) -> Tensor:
    return torch.randint(0, VOCAB, (count,), generator=torch.Generator().manual_seed(seed))


def alone(model: Decoder, tokens: Tensor) -> Tensor:
    """(T, V): the logits of one plain forward pass over one sequence."""
    with torch.no_grad(), unchecked():
        return model(tokens[None])[0]


def assert_same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)


def differ(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).abs().max() > 1e-2)


# One layer by hand, in float64, token by token; and what it would say with each of the mistakes.


def layer_of(kind: str, *, top_k: int = 3) -> CompressedAttention:
    config = Compressed(
        num_heads=4,
        head_dim=16,
        sliding_window=5,
        rotary=YARN,
        rotary_width=8,
        query_rank=12,
        output_groups=2,
        output_rank=6,
        compressor={"sparse": Compressor(ratio=4, overlap=True), "heavy": Compressor(ratio=7)}[kind],
        indexer=Indexer(num_heads=16, head_dim=8, top_k=top_k) if kind == "sparse" else None,
    )
    layer = lively(config.build(Site(HIDDEN, VOCAB, 1, EPS, 0)))
    assert isinstance(layer, CompressedAttention)
    return layer


def turned(x: Tensor, position: int, *, back: bool = False, mistake: str = "") -> Tensor:
    """x (.., D) with its last 8 channels turned: pairs side by side."""
    rotary = DefaultRotary(theta=10000.0) if mistake == "wrong theta for the window's keys" else YARN
    angles = rotary.inverse_frequencies(8).double() * position * (-1 if back else 1)
    factor = 0.1 * math.log(16) + 1 if mistake == "YaRN's attention factor" else 1.0
    cos, sin = angles.cos() * factor, angles.sin() * factor
    still, pairs = x[..., :-8], x[..., -8:].unflatten(-1, (4, 2))
    a, b = pairs[..., 0], pairs[..., 1]
    return torch.cat([still, torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)], -1)


def normed(x: Tensor, weight: Tensor | float = 1.0) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight


def entries_by_hand(compressor: torch.nn.Module, x: Tensor, mistake: str) -> Tensor:
    """(J, D): an entry of every complete window."""
    weights = {name: tensor.detach().double() for name, tensor in compressor.named_parameters()}
    ratio, overlap, width = compressor.config.ratio, compressor.config.overlap, compressor.width
    values, gates = x @ weights["kv_proj.weight"].T, x @ weights["gate_proj.weight"].T
    entries = []
    for j in range(len(x) // ratio):
        own = slice(j * ratio, (j + 1) * ratio)
        value, gate = values[own], gates[own] + weights["position_bias"]
        if overlap:  # the window's own tokens through the second channels, those before through the first
            value, gate = value[:, width:], gate[:, width:]
            before = slice((j - 1) * ratio, j * ratio)
            if j > 0:
                value = torch.cat([values[before, :width], value])
                gate = torch.cat([gates[before, :width] + weights["position_bias"][:, :width], gate])
            elif mistake == "empty tokens before the first window":
                value = torch.cat([torch.zeros(ratio, width), value])
                gate = torch.cat([torch.zeros(ratio, width), gate])
        entry = normed((gate.softmax(0) * value).sum(0), weights["norm.weight"])
        position = j * ratio + (ratio - 1 if mistake == "entries at the last token of their window" else 0)
        entries.append(turned(entry, position, mistake=mistake if mistake.startswith("YaRN") else ""))
    return torch.stack(entries)


class ByHand:
    """A layer of an input x (T, C): its parts, and what it gives."""

    def __init__(self, layer: CompressedAttention, x: Tensor, mistake: str = "") -> None:
        self.layer, self.x, self.mistake = layer, x.double(), mistake
        self.factor = mistake if mistake.startswith("YaRN") else ""
        self.weights = weights = {name: tensor.detach().double() for name, tensor in layer.named_parameters()}
        self.entries = entries_by_hand(layer.compressor, self.x, mistake)
        self.low_rank = normed(self.x @ weights["q_a_proj.weight"].T, weights["q_a_norm.weight"])
        queries = normed((self.low_rank @ weights["q_b_proj.weight"].T).unflatten(1, (4, 16)))
        keys = normed(self.x @ weights["kv_proj.weight"].T, weights["kv_norm.weight"])
        self.queries = [turned(query, t, mistake=self.factor) for t, query in enumerate(queries)]
        self.keys = torch.stack([turned(key, t, mistake=mistake) for t, key in enumerate(keys)])
        self.visible = [(t + 1) // layer.config.compressor.ratio for t in range(len(x))]

    def output(self) -> Tensor:
        """(T, C)"""
        weights, outputs = self.weights, []
        for t, picks in enumerate(self.picks()):
            seen = torch.cat([self.window(t), self.entries[picks]])
            output = self.attention(t, seen) @ seen
            if self.mistake != "output not turned back":
                output = turned(output, t, back=True, mistake=self.factor)
            groups = output.flatten().unflatten(0, (2, 32))
            parts = weights["o_a_proj.weight"].split(6)
            low = torch.cat([group @ part.T for group, part in zip(groups, parts, strict=True)])
            outputs.append(low @ weights["o_b_proj.weight"].T)
        return torch.stack(outputs)

    def window(self, t: int) -> Tensor:
        return self.keys[max(t - 4, 0) : t + 1]

    def attention(self, t: int, seen: Tensor) -> Tensor:
        """(H, S): the weight of each row seen; the sink has the rest."""
        scores = (self.queries[t] @ seen.T / 4).exp()
        return scores / (self.weights["sink"].exp()[:, None] + scores.sum(1, keepdim=True))

    def picks(self) -> list[list[int]]:
        if self.layer.indexer is None:
            return [list(range(count)) for count in self.visible]
        top_k, picks = self.layer.indexer.config.top_k, []
        for scores, visible in zip(self.index_scores().tolist(), self.visible, strict=True):
            allowed = range(len(scores) if self.mistake == "an indexer without a causal mask" else visible)
            picks.append(sorted(allowed, key=lambda j, scores=scores: -scores[j])[:top_k])
        if self.mistake == "every query sees the picks of all":
            return [sorted({pick for own in picks for pick in own})] * len(picks)
        if self.mistake == "picks of -1 are taken for the last entry":
            return [own + [-1] * (top_k - len(own)) for own in picks]
        return picks

    def index_scores(self) -> Tensor:
        """(T, J): of every entry, seen or not."""
        indexer = self.layer.indexer
        keys = entries_by_hand(indexer.compressor, self.x, self.mistake)
        queries = (self.low_rank @ self.weights["indexer.q_proj.weight"].T).unflatten(1, (16, 8))
        weights = self.x @ self.weights["indexer.weights_proj.weight"].T * 16**-0.5 * 8**-0.5
        return torch.stack([weights[t] @ (turned(query, t) @ keys.T).relu() for t, query in enumerate(queries)])


MISTAKES = [
    pytest.param("sparse", "every query sees the picks of all", id="transformers 45758: picks flattened"),
    pytest.param("sparse", "an indexer without a causal mask", id="transformers 45820: indexer not causal"),
    pytest.param("sparse", "wrong theta for the window's keys", id="transformers 45910, mlx-lm 1189: theta, CSA"),
    pytest.param("heavy", "wrong theta for the window's keys", id="transformers 45910, mlx-lm 1189: theta, HCA"),
    pytest.param("sparse", "YaRN's attention factor", id="Atlas 342: attention factor, CSA"),
    pytest.param("heavy", "YaRN's attention factor", id="Atlas 342: attention factor, HCA"),
    pytest.param("sparse", "entries at the last token of their window", id="mlx-lm 1189: entries' position, CSA"),
    pytest.param("heavy", "entries at the last token of their window", id="mlx-lm 1189: entries' position, HCA"),
    pytest.param("sparse", "output not turned back", id="output not rotated back, CSA"),
    pytest.param("heavy", "output not turned back", id="output not rotated back, HCA"),
    pytest.param("sparse", "picks of -1 are taken for the last entry", id="-1 picks not masked"),
    pytest.param("sparse", "empty tokens before the first window", id="zeros before the first window"),
]


@pytest.mark.parametrize(("kind", "mistake"), MISTAKES)
@torch.no_grad()
def test_a_layer_makes_none_of_the_known_mistakes(kind: str, mistake: str) -> None:
    """It agrees with the formulas, computed by hand; with the mistake they would say something else."""
    layer, x = layer_of(kind), torch.randn(40, HIDDEN)
    wanted = ByHand(layer, x).output()
    for version in ("fast", "reference"):
        with kernels.use(version):  # type: ignore[arg-type]
            ours = layer(x, Step.of(torch.zeros(40, dtype=torch.long), [40], None)).double()
        torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-5)
    assert differ(ByHand(layer, x, mistake).output(), wanted)


@torch.no_grad()
def test_the_shared_expert_is_limited_like_the_others() -> None:
    """transformers 46018: swiglu_limit applied to the routed experts only."""
    config = MixtureOfExperts(
        num_experts=4,
        top_k=2,
        intermediate_size=8,
        shared_intermediate_size=8,
        router=SqrtSoftplusRouter(),
        routed_scale=1.5,
        limit=0.3,
    )
    block = lively(config.build(Site(HIDDEN, VOCAB, 1, EPS, 0)))
    x = torch.randn(20, HIDDEN)
    ours = block(x, Step.of(torch.zeros(20, dtype=torch.long), [20], None))

    def unit(gate: Tensor, up: Tensor, limited: bool = True) -> Tensor:
        if limited:
            gate, up = gate.clamp(max=0.3), up.clamp(-0.3, 0.3)
        return gate * gate.sigmoid() * up

    def shared(limited: bool) -> Tensor:
        gate, up, down = (getattr(block.shared_expert, f"{name}_proj").weight for name in ("gate", "up", "down"))
        return unit(x @ gate.T, x @ up.T, limited) @ down.T

    scores = (1 + (x @ block.router.proj.weight.T).exp()).log().sqrt()
    chosen = (scores + block.router.selection_bias).topk(2).indices
    routed = torch.zeros_like(x)
    for t in range(20):
        for expert in chosen[t]:
            gate, up = (block.gate_up_proj[expert] @ x[t]).chunk(2)
            weight = scores[t, expert] / scores[t, chosen[t]].sum() * 1.5
            routed[t] += weight * (block.down_proj[expert] @ unit(gate, up))
    torch.testing.assert_close(ours, routed + shared(limited=True), rtol=0, atol=1e-5)
    assert differ(routed + shared(limited=False), ours)


# Whole models: window, CSA and HCA layers, hash and learned routing, hyper-connections, a draft block.


def small_config(sparse: int = 4, heavy: int = 8, **fields: object) -> ModelConfig:
    types = ["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"]
    rates = {types[1]: sparse, types[2]: heavy}
    released = {name: value for name, value in DEEPSEEK_V4.items() if name != "compress_ratios"}
    layers = {"num_hidden_layers": 4, "layer_types": [*types, types[1]], "compress_rates": rates}
    return parse_config(released | layers | {"sliding_window": 6, "num_nextn_predict_layers": 0} | fields)


@pytest.fixture(scope="module")
def model() -> Decoder:
    """Ratios 4 and 8, a window of 6."""
    return lively(Decoder(small_config()))  # type: ignore[return-value]


@pytest.fixture(scope="module")
def released_ratios() -> Decoder:
    """Ratios 4 and 128, a window of 16."""
    return lively(Decoder(small_config(heavy=128, sliding_window=16)))  # type: ignore[return-value]


def remembers(model: Decoder, tokens: Tensor, position: int) -> bool:
    """Whether the last token's logits depend on the token at `position`: that a state matters must be seen first."""
    other = tokens.clone()
    other[position] = (tokens[position] + 1) % VOCAB
    return differ(alone(model, other)[-1], alone(model, tokens)[-1])


def test_each_sequence_of_a_ragged_batch_is_what_it_is_alone(released_ratios: Decoder) -> None:
    """transformers 45938: left padding, off by 3 to 5 logits."""
    counts = [3, 129, 1, 4, 40, 131]
    tokens = tokens_of(sum(counts))
    cache = released_ratios.make_cache(len(counts))
    with torch.no_grad(), unchecked():
        without = released_ratios(tokens[None], counts=counts)[0].split(counts)
        held = released_ratios(tokens[None], cache=cache, counts=counts)[0].split(counts)
        new = tokens_of(2 * len(counts), seed=1).view(len(counts), 2)
        after = released_ratios(new, cache=cache)
    for own, one, other, pair, last in zip(tokens.split(counts), without, held, new, after, strict=True):
        wanted = alone(released_ratios, torch.cat([own, pair]))
        assert_same(one, wanted[:-2])
        assert_same(other, wanted[:-2])
        assert_same(last, wanted[-2:])


def test_packed_documents_are_compressed_each_on_its_own(released_ratios: Decoder) -> None:
    """transformers 5.23: the second document sees the first one's entries, off by 3 to 4 logits."""
    first, other, second = tokens_of(130, 1), tokens_of(130, 2), tokens_of(133, 3)
    with torch.no_grad():
        packed, changed = (
            released_ratios(torch.cat([document, second])[None], counts=[130, 133])[0] for document in (first, other)
        )
    assert_same(packed[130:], alone(released_ratios, second))
    assert differ(packed[:130], changed[:130])
    assert_same(packed[130:], changed[130:])
    run_on = alone(released_ratios, torch.cat([first, second]))[130:]
    assert differ(run_on, packed[130:]), "the documents must be of the kind that could see each other"


@pytest.mark.parametrize("size", [1, 3, 4, 5, 11])
def test_the_indexers_entries_outlive_a_chunk(model: Decoder, size: int) -> None:
    """mlx-lm 1189: picks among the entries of the last chunk only."""
    tokens = tokens_of(45)
    cache = model.make_cache()
    with unchecked():
        logits = torch.cat([model(piece[None], cache=cache)[0] for piece in tokens.split(size)])
    assert_same(logits, alone(model, tokens))
    held = {name: stream.count for (layer, name), stream in cache.sequences[0].streams.items() if layer == 1}
    assert (held["entry"], held["index"]) == (45 // 4, 45 // 4)
    # They matter: with others in their place the next token's logits change.
    forgotten = cache.fork()
    forgotten.sequences[0].streams[1, "index"].held.neg_()
    with unchecked():
        assert differ(model(tokens[:1, None], cache=forgotten), model(tokens[:1, None], cache=cache))


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 9])
def test_nothing_of_a_long_prompt_is_left_for_a_short_one(model: Decoder, count: int, tmp_path: Path) -> None:
    """The reference code: a prompt of fewer than 4 tokens after a longer one is off by 0.8. Here a cache that was
    rewound to its start, a new one, one that was forked or loaded empty, and no cache at all."""
    long, short = tokens_of(50, 1), tokens_of(count, 2)
    wanted = alone(lively(Decoder(model.config)), short)  # type: ignore[arg-type]
    rewound, empty = model.make_cache(max_rewind=50), model.make_cache()
    empty.save(tmp_path / "state")
    with unchecked():
        for piece in long.split(7):
            model(piece[None], cache=rewound)
        rewound.rewind(50)
        for cache in (rewound, model.make_cache(), empty.fork(), Cache.load(tmp_path / "state", model)):
            assert_same(model(short[None], cache=cache)[0], wanted)
    assert_same(alone(model, short), wanted)


@pytest.mark.parametrize("back", range(1, 12))
def test_a_rewind_at_every_phase_of_the_windows_leaves_no_trace(model: Decoder, back: int) -> None:
    """SGLang 34189: state that cannot go back, and rings too small for the drafts. Eleven tokens are more than the
    window of 6, two windows of 4 and one of 8. A batch of sequences that stand at every phase of a window of 8."""
    lengths = range(11, 19)
    tokens = tokens_of(18)
    cache = model.make_cache(len(lengths), max_rewind=11, max_length=40 if back % 2 else None)
    new = tokens_of(len(lengths) * (back + 2), seed=1).view(len(lengths), back + 2)
    with torch.no_grad(), unchecked():
        model(torch.cat([tokens[:length] for length in lengths])[None], cache=cache, counts=list(lengths))
        cache.rewind(back)
        logits = torch.cat([model(piece, cache=cache) for piece in new.split(back + 1, dim=1)], dim=1)
        whole = [torch.cat([tokens[: length - back], own]) for length, own in zip(lengths, new, strict=True)]
        counts = [len(sequence) for sequence in whole]
        wanted = model(torch.cat(whole)[None], counts=counts)[0].split(counts)
    for rows, right in zip(logits, wanted, strict=True):
        assert_same(rows, right[-len(rows) :])


@pytest.mark.parametrize("length", [127, 128, 129, 131, 255, 256, 258])
def test_a_rewind_across_the_end_of_a_window_of_128_leaves_no_trace(released_ratios: Decoder, length: int) -> None:
    """SGLang 34189: an entry that a draft has completed is dropped with it, and formed again of other tokens."""
    tokens, cache = tokens_of(length), released_ratios.make_cache(max_rewind=4)
    assert length < 128 or remembers(released_ratios, tokens, 5), "the first entry must matter"
    with unchecked():
        released_ratios(tokens[None, :-1], cache=cache)
        released_ratios(tokens[None, -1:], cache=cache)
        for back in (1, 2, 4):
            fork, new = cache.fork(), tokens_of(back + 1, seed=back)
            fork.rewind(back)
            wanted = alone(released_ratios, torch.cat([tokens[: length - back], new]))
            assert_same(released_ratios(new[None], cache=fork)[0], wanted[length - back :])


@pytest.mark.parametrize("length", [*range(1, 9), 31, 32, 33])
def test_a_kept_prefix_brings_back_windows_and_unfinished_entries(
    model: Decoder, length: int, tmp_path: Path
) -> None:
    """ATOM 1417, SGLang 30339: a prefix found again, without the window or the compressor's state."""
    prefix, rest = tokens_of(length, 1), tokens_of(9, 2)
    cache = model.make_cache(max_rewind=3)
    with unchecked():
        model(prefix[None], cache=cache)
        cache.save(tmp_path / "prefix")
        model(tokens_of(5, 3)[None], cache=cache)  # whoever computed it goes on
        wanted = alone(model, torch.cat([prefix, rest]))[length:]
        for _ in range(2):  # it may be found twice
            loaded = Cache.load(tmp_path / "prefix", model)
            counts = {name: stream.count for (_, name), stream in loaded.sequences[0].streams.items()}
            assert counts["window"] == min(length, 5 + 3)
            assert counts["index_raw"] == min(length, 7 + 3)
            assert counts["index"] == length // 4
            assert_same(torch.cat([model(piece[None], cache=loaded)[0] for piece in rest.split(4)]), wanted)


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 7, 8, 127, 128, 129, 131, 132, 255, 256, 259])
def test_prompts_of_every_length_beside_a_multiple_of_the_ratios(released_ratios: Decoder, length: int) -> None:
    """vLLM 55927: lengths of 3 modulo 4. The prompt at once, its last token alone, and one token after it."""
    tokens = tokens_of(length + 1)
    wanted = alone(released_ratios, tokens)
    cache, by_parts = released_ratios.make_cache(), released_ratios.make_cache()
    with unchecked():
        assert_same(released_ratios(tokens[None, :-1], cache=cache, last_only=True)[0], wanted[-2:-1])
        if length > 1:
            released_ratios(tokens[None, :-2], cache=by_parts)
        assert_same(released_ratios(tokens[None, -2:-1], cache=by_parts)[0], wanted[-2:-1])
        for one in (cache, by_parts):
            assert_same(released_ratios(tokens[None, -1:], cache=one)[0], wanted[-1:])


def test_the_future_changes_nothing(model: Decoder) -> None:
    """transformers 45758 and 45820, in a whole model: whatever comes later, the logits up to here are the same."""
    tokens = tokens_of(60)
    logits = alone(model, tokens)
    for cut in (1, 3, 4, 7, 8, 30, 31, 32, 33):
        assert_same(alone(model, torch.cat([tokens[:cut], tokens_of(60 - cut, seed=cut)]))[:cut], logits[:cut])


def one_layer(ratio: int, overlap: bool, indexer: bool) -> Decoder:
    """A layer that sees the token itself and entries, and nothing besides."""
    attention = Compressed(
        num_heads=4,
        head_dim=16,
        sliding_window=1,
        rotary=YARN,
        rotary_width=8,
        query_rank=12,
        output_groups=2,
        output_rank=6,
        compressor=Compressor(ratio=ratio, overlap=overlap),
        indexer=Indexer(num_heads=16, head_dim=8, top_k=100) if indexer else None,
    )
    layer = LayerConfig(attention=attention, feed_forward=GatedMLP(intermediate_size=24))
    config = ModelConfig(vocab_size=VOCAB, hidden_size=HIDDEN, max_positions=256, layers=(layer,))
    return lively(Decoder(config))  # type: ignore[return-value]


@pytest.mark.parametrize("changed", range(8, 17))
@pytest.mark.parametrize(("ratio", "overlap", "indexer"), [(4, True, True), (5, True, False), (4, False, False)])
def test_a_token_is_seen_through_entries_from_its_windows_end_on(
    ratio: int, overlap: bool, indexer: bool, changed: int
) -> None:
    """With a window of 1 everything older comes through entries: a token changes itself, nothing until the last token
    of its window, and everything from there on. With overlap it is part of two entries."""
    model, tokens = one_layer(ratio, overlap, indexer), tokens_of(32)
    other = tokens.clone()
    other[changed] = (tokens[changed] + 1) % VOCAB
    caches = [model.make_cache(), model.make_cache()]
    one, two = (model(each[None], cache=cache)[0] for each, cache in zip((tokens, other), caches, strict=True))
    end = changed // ratio * ratio + ratio - 1
    unlike = [bool((one[t] - two[t]).abs().max() > 1e-5) for t in range(32)]
    assert unlike == [t == changed or t >= end for t in range(32)]
    entries = [cache.sequences[0].streams[0, "entry"].held for cache in caches]
    own = changed // ratio
    moved = [bool((a - b).abs().max() > 1e-5) for a, b in zip(*entries, strict=True)]
    assert moved == [j == own or (overlap and j == own + 1) for j in range(32 // ratio)]


def test_a_cache_can_be_filled_under_autocast(released_ratios: Decoder) -> None:
    """Queries are bf16 there, and what the cache holds is not."""
    tokens = tokens_of(300)[None]
    with unchecked(), torch.no_grad():
        wanted = released_ratios(tokens)
        with torch.autocast("cpu", torch.bfloat16):
            found = released_ratios(tokens, cache=released_ratios.make_cache())
    assert torch.cosine_similarity(found.float(), wanted, dim=-1).mean() > 0.99
