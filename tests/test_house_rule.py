"""The house rule: whole sequence = any chunks = token by token = after rewind and replay = in any ragged batch.

For drawn configs over everything that is registered, in fp32, 1e-4 on the logits. Memory that nobody has written is
filled with NaN, so a row that is read by mistake shows.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from strategies import (
    ATTENTIONS,
    CONNECTIONS,
    FEED_FORWARDS,
    ROUTERS,
    VOCAB,
    configs,
    random_model,
)
from torch import Tensor

from kvell import Cache, Decoder, ModelConfig, generate, kernels
from kvell.layers import registry

# A failing model is small already: shrinking it further would take minutes.
DRAWN = settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
)
CONFIGS = configs()
SEEDS = st.integers(0, 1000)


@pytest.fixture(autouse=True, scope="module")
def _poisoned_memory() -> Iterator[None]:
    """torch.empty gives NaN instead of whatever lay there."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


def draw_tokens(seed: int, *shape: int) -> Tensor:
    return torch.randint(0, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def assert_same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


def alone(model: Decoder, tokens: Tensor) -> Tensor:
    """The logits of one plain forward pass over one sequence."""
    with torch.no_grad():
        return model(tokens[None])[0]


def in_chunks(model: Decoder, cache: Cache, tokens: Tensor, sizes: list[int]) -> Tensor:
    """tokens (B, n), fed in chunks of these sizes; a last chunk takes what remains."""
    cuts = [0]
    for size in sizes:
        cuts.append(min(cuts[-1] + size, tokens.shape[1]))
    pairs = zip(cuts, [*cuts[1:], tokens.shape[1]], strict=True)
    return torch.cat([model(tokens[:, a:b], cache=cache) for a, b in pairs if b > a], dim=1)


@pytest.mark.parametrize(
    ("kinds", "strategies"),
    [
        (registry.ATTENTIONS, ATTENTIONS),
        (registry.FEED_FORWARDS, FEED_FORWARDS),
        (registry.CONNECTIONS, CONNECTIONS),
        (registry.ROUTERS, ROUTERS),
    ],
)
def test_every_registered_kind_is_drawn(kinds: registry.Registry, strategies: dict[str, object]) -> None:
    assert set(kinds.kinds) == set(strategies)


@DRAWN
@given(config=CONFIGS, seed=SEEDS, sizes=st.lists(st.integers(1, 9), max_size=8), reserve=st.booleans())
def test_chunks_give_what_the_whole_gives(config: ModelConfig, seed: int, sizes: list[int], reserve: bool) -> None:
    model, tokens = random_model(config, seed), draw_tokens(seed, 2, 23)
    with torch.no_grad():
        whole = model(tokens)
    cache = model.make_cache(2, max_length=23 if reserve else None)
    assert_same(in_chunks(model, cache, tokens, sizes), whole)
    assert cache.lengths == [23, 23]


@DRAWN
@given(config=CONFIGS, seed=SEEDS)
def test_token_by_token_gives_what_the_whole_gives(config: ModelConfig, seed: int) -> None:
    model, tokens = random_model(config, seed), draw_tokens(seed, 1, 75)
    assert_same(in_chunks(model, model.make_cache(), tokens, [1] * 75)[0], alone(model, tokens[0]))


@DRAWN
@given(config=CONFIGS, seed=SEEDS, sizes=st.lists(st.integers(1, 9), max_size=4))
def test_last_only_gives_the_last_row(config: ModelConfig, seed: int, sizes: list[int]) -> None:
    model, tokens = random_model(config, seed), draw_tokens(seed, 2, 20)
    with torch.no_grad():
        whole = model(tokens)
        assert_same(model(tokens, last_only=True), whole[:, -1:])
    cache = model.make_cache(2)
    at = 0
    for size in [*sizes, 1]:
        stop = min(at + size, 20)
        if stop > at:
            assert_same(model(tokens[:, at:stop], cache=cache, last_only=True), whole[:, stop - 1 : stop])
        at = stop


@DRAWN
@given(config=CONFIGS, seed=SEEDS, data=st.data())
def test_after_a_rewind_the_taken_back_tokens_never_were(config: ModelConfig, seed: int, data: st.DataObject) -> None:
    model = random_model(config, seed)
    max_rewind = data.draw(st.integers(1, 20), label="max_rewind")
    reserve = data.draw(st.booleans(), label="reserve")
    cache = model.make_cache(max_rewind=max_rewind, max_length=200 if reserve else None)
    kept: list[int] = []
    for turn in range(6):
        fed = draw_tokens(seed + turn, data.draw(st.integers(1, 14), label="fed"))
        logits = model(fed[None], cache=cache)[0]
        kept += fed.tolist()
        assert_same(logits, alone(model, torch.tensor(kept))[-len(fed) :])
        back = data.draw(st.integers(0, cache.rewindable[0]), label="back")
        cache.rewind(back)
        kept = kept[: len(kept) - back]
        assert cache.lengths == [len(kept)]


@DRAWN
@given(config=CONFIGS, seed=SEEDS, data=st.data())
def test_a_ragged_batch_gives_each_sequence_what_it_gets_alone(
    config: ModelConfig, seed: int, data: st.DataObject
) -> None:
    model = random_model(config, seed)
    count = data.draw(st.integers(2, 4), label="sequences")
    held: list[list[int]] = [[] for _ in range(count)]
    cache = model.make_cache(count, max_rewind=3)
    for turn in range(3):
        counts = data.draw(st.lists(st.integers(1, 15), min_size=count, max_size=count), label="counts")
        fed = draw_tokens(seed + turn, sum(counts))
        logits = model(fed[None], cache=cache, counts=counts)[0]
        for sequence, new, rows in zip(held, fed.split(counts), logits.split(counts), strict=True):
            sequence += new.tolist()
            assert_same(rows, alone(model, torch.tensor(sequence))[-len(new) :])
        backs = data.draw(st.lists(st.integers(0, 1), min_size=count, max_size=count), label="backs")
        cache.rewind(backs)
        held = [sequence[: len(sequence) - back] for sequence, back in zip(held, backs, strict=True)]
    next_tokens = draw_tokens(seed + 9, count, 1)
    together = model(next_tokens, cache=cache)
    for index, sequence in enumerate(held):
        assert_same(together[index], alone(model, torch.tensor(sequence + next_tokens[index].tolist()))[-1:])


@DRAWN
@given(config=CONFIGS, seed=SEEDS, counts=st.lists(st.integers(1, 17), min_size=1, max_size=4))
def test_packed_documents_do_not_see_each_other(config: ModelConfig, seed: int, counts: list[int]) -> None:
    model, tokens = random_model(config, seed), draw_tokens(seed, sum(counts))
    with torch.no_grad():
        packed = model(tokens[None], counts=counts)[0]
        ends = model(tokens[None], counts=counts, last_only=True)[0]
    for document, rows, end in zip(tokens.split(counts), packed.split(counts), ends, strict=True):
        assert_same(rows, alone(model, document))
        assert_same(end, alone(model, document)[-1])


@DRAWN
@given(config=CONFIGS, seed=SEEDS)
def test_merged_saved_and_forked_caches_continue_as_if_nothing_had_happened(config: ModelConfig, seed: int) -> None:
    model = random_model(config, seed)
    prompts = [draw_tokens(seed + n, n) for n in (1, 9, 30)]
    caches = [model.make_cache(max_rewind=2) for _ in prompts]
    for prompt, cache in zip(prompts, caches, strict=True):
        model(prompt[None], cache=cache)
    merged = Cache.merge(caches)
    assert merged.lengths == [1, 9, 30]
    assert merged.nbytes == sum(cache.nbytes for cache in caches)
    with tempfile.TemporaryDirectory() as folder:
        merged.save(Path(folder) / "cache.safetensors")
        loaded = Cache.load(Path(folder) / "cache.safetensors", model)
    fork = merged.fork()
    model(draw_tokens(seed + 1, 3, 5), cache=fork)  # what happens to a fork is nobody else's business
    new = draw_tokens(seed + 2, 3, 4)
    expected = [alone(model, torch.cat([prompt, row]))[-4:] for prompt, row in zip(prompts, new, strict=True)]
    for cache in (merged, loaded, loaded.fork()):
        cache.rewind(0)
        logits = model(new, cache=cache.fork())
        for rows, right in zip(logits, expected, strict=True):
            assert_same(rows, right)
    for rows, right in zip(model(new[[2, 0]], cache=merged.select([2, 0])), [expected[2], expected[0]], strict=True):
        assert_same(rows, right)


@DRAWN
@given(config=CONFIGS, seed=SEEDS, sizes=st.lists(st.integers(1, 9), max_size=4))
def test_reference_kernels_agree_with_the_fast_ones(config: ModelConfig, seed: int, sizes: list[int]) -> None:
    model, tokens = random_model(config, seed), draw_tokens(seed, 2, 20)
    fast = in_chunks(model, model.make_cache(2), tokens, sizes)
    with kernels.use("reference"):
        reference = in_chunks(model, model.make_cache(2), tokens, sizes)
    assert_same(fast, reference)


@DRAWN
@given(config=CONFIGS, seed=SEEDS, drafts=st.integers(1, 6))
def test_speculation_gives_the_very_tokens_of_plain_decoding(config: ModelConfig, seed: int, drafts: int) -> None:
    model, prompt = random_model(config, seed), draw_tokens(seed, 19).tolist() * 2
    plain = [int(piece) for piece in generate(model, prompt, max_new_tokens=24)]
    ways = ["lookup"] if model.draft_block is None else ["lookup", "mtp"]
    for way in ways:
        cache = model.make_cache(max_rewind=drafts)
        pieces = generate(model, prompt, max_new_tokens=24, speculate=way, num_drafts=drafts, cache=cache)  # type: ignore[arg-type]
        assert [int(piece) for piece in pieces] == plain, way
        assert cache.lengths == [len(prompt) + 23]
        following = model(torch.tensor([plain[-1:]]), cache=cache)[0, -1]
        assert_same(following, alone(model, torch.tensor(prompt + plain))[-1])


def loss_of_all_parts(model: Decoder, tokens: Tensor) -> Tensor:
    """Next tokens by the model, the tokens after by its draft block, and what trains its indexers."""
    logits, streams = model(tokens, return_streams=True)
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    if model.draft_block is not None:
        drafts, _ = model.draft(streams[:, :-1], tokens[:, 1:])
        loss = loss + torch.nn.functional.cross_entropy(drafts[:, :-1].flatten(0, 1), tokens[:, 2:].flatten())
    if any(getattr(layer.attention, "indexer", None) is not None for layer in model.config.layers):
        loss = loss + model.index_loss(tokens)
    return loss


@DRAWN
@given(config=CONFIGS, seed=SEEDS)
def test_gradients_reach_every_parameter_and_survive_checkpointing(config: ModelConfig, seed: int) -> None:
    tokens = draw_tokens(seed, 2, 12)
    gradients = []
    for checkpointing, version in ((False, "fast"), (True, "fast"), (False, "reference")):
        model = random_model(config, seed).train()
        model.activation_checkpointing = checkpointing
        with kernels.use(version):  # type: ignore[arg-type]
            loss_of_all_parts(model, tokens).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    # Rounding in the largest gradients shows in the small ones that are computed from them.
    steepest = max(float(gradient.abs().max()) for gradient in gradients[0].values() if gradient is not None)
    for name, gradient in gradients[0].items():
        assert gradient is not None, f"{name} gets no gradient"
        for other in gradients[1:]:
            assert other[name] is not None, name
            torch.testing.assert_close(
                gradient, other[name], atol=1e-4 * max(steepest, 1), rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}"
            )
