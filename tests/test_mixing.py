"""Any technique beside any other: pairwise.py finds models in which every two of them stand together, and each of
these models works in every way a model works; and what layers share, and refuse to share."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from pairwise import (
    BY_NAME,
    HEAVY,
    INDEXER,
    LAYERS,
    ROOM,
    SPARSE,
    TECHNIQUES,
    compressed,
    configs,
    convolutional,
    grouped_query,
    models,
    pairs_of,
    wanted_pairs,
)
from strategies import HIDDEN, VOCAB, random_model, router_of
from test_house_rule import (
    _poisoned_memory,  # noqa: F401
    alone,
    assert_same,
    draw_tokens,
    in_chunks,
    loss_of_all_parts,
)
from torch import Tensor

import kvell
from kvell import ConfigError, Decoder, ModelConfig
from kvell.config import LayerConfig
from kvell.layers import registry
from kvell.layers.compressor import Compressor
from kvell.layers.feed_forward import GatedMLP
from kvell.step import Step

MODELS = configs()
every_model = pytest.mark.parametrize("config", MODELS.values(), ids=[str(number) for number in range(len(MODELS))])


def test_every_two_techniques_stand_together_in_a_model() -> None:
    assert set(wanted_pairs()) == set().union(*(pairs_of(list(names)) for names in models()))


def test_a_models_parts_are_those_of_its_techniques() -> None:
    """Counted in the configs themselves, whatever the generator says of them."""
    for names, config in zip(models(), MODELS.values(), strict=True):
        assert len(set(names)) == len(names) == sum(ROOM.values())
        assert config.num_layers == LAYERS
        read = sum(BY_NAME[name].source is not None for name in names)
        assert read == sum(1 for layer in config.layers for _ in layer.layer_sources())
        assert (config.per_layer_embedding is None) == ("no per-layer embeddings" in names)
        assert (config.draft is None) == ("no draft block" in names)


@pytest.mark.parametrize(
    ("kinds", "found"),
    [
        (registry.ATTENTIONS, {layer.attention.kind for config in MODELS.values() for layer in config.layers}),
        (registry.FEED_FORWARDS, {layer.feed_forward.kind for config in MODELS.values() for layer in config.layers}),
        (registry.CONNECTIONS, {config.connection.kind for config in MODELS.values()}),
        (registry.ROUTERS, {router_of(layer.feed_forward) for c in MODELS.values() for layer in c.layers} - {None}),
    ],
    ids=["attention", "feed_forward", "connection", "router"],
)
def test_every_registered_kind_is_in_a_model(kinds: registry.Registry, found: set[str]) -> None:
    assert found == set(kinds.kinds)


def test_every_two_attentions_that_can_share_do_so() -> None:
    """Of those here that read nothing, with the fields alike that must be: whatever check_source lets through."""
    apart = [one.make(None) for one in TECHNIQUES if one.place == "attention" and one.source is None]
    possible = {
        (reader.kind, source.kind)
        for reader in apart
        for source in apart
        if reader.model_copy(update={"kv_source": 0}).check_source(source) is None
    }
    sharing = {
        (layer.attention.kind, config.layers[layer.attention.kv_source].attention.kind)
        for config in MODELS.values()
        for layer in config.layers
        if layer.attention.kv_source is not None
    }
    assert sharing == possible


@every_model
def test_whole_chunked_rewound_ragged_and_packed_are_the_same(config: ModelConfig) -> None:
    """23 tokens: windows end inside them, 4 entries of 5 tokens and 7 of 3 are complete, more than are picked."""
    model, tokens, other = random_model(config), draw_tokens(1, 2, 23), draw_tokens(2, 2, 9)
    with torch.no_grad():
        whole = model(tokens)
        assert_same(model(tokens, last_only=True), whole[:, -1:])
    sizes = torch.randint(1, 8, (8,)).tolist()
    cache = model.make_cache(2, max_rewind=9)
    assert_same(in_chunks(model, cache, tokens[:, :16], sizes), whole[:, :16])
    model(other, cache=cache)
    cache.rewind(9)
    assert_same(model(tokens[:, 16:], cache=cache), whole[:, 16:])
    assert cache.lengths == [23, 23]

    begun = [7, 12]
    first = torch.cat([tokens[0, :7], tokens[1, :12]])[None]
    second = torch.cat([tokens[0, 7:], tokens[1, 12:]])[None]
    cache = model.make_cache(2)
    with torch.no_grad():
        packed = model(first, counts=begun)
    for logits in (packed, model(first, cache=cache, counts=begun)):
        assert_same(logits[0], torch.cat([whole[0, :7], whole[1, :12]]))
    ragged = model(second, cache=cache, counts=[23 - count for count in begun])
    assert_same(ragged[0], torch.cat([whole[0, 7:], whole[1, 12:]]))
    assert_same(alone(model, tokens[1]), whole[1])


@every_model
def test_a_gradient_that_is_not_zero_reaches_every_parameter(config: ModelConfig) -> None:
    model = random_model(config).train()
    loss_of_all_parts(model, draw_tokens(3, 2, 23)).backward()
    trained = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained
    for name, gradient in trained.items():
        assert gradient is not None, f"{name} gets no gradient"
        assert gradient.isfinite().all(), f"{name} gets a gradient that is not finite"
        assert gradient.count_nonzero() > 0, f"{name} gets nothing but zeros"


@every_model
def test_a_small_step_against_the_gradient_lowers_the_loss_by_what_the_gradient_says(config: ModelConfig) -> None:
    """By the learning rate times the gradient's square, in a step so small that the loss is straight along it and no
    token changes its experts or its entries. Indexers are left out: what they learn to follow moves with the rest."""
    model, tokens = random_model(config).train(), draw_tokens(4, 2, 23)
    moved = [one for name, one in model.named_parameters() if one.requires_grad and ".indexer." not in name]

    def loss() -> Tensor:
        logits, streams = model(tokens, return_streams=True)
        total = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        if model.draft_block is not None:
            drafts, _ = model.draft(streams[:, :-1], tokens[:, 1:])
            total = total + torch.nn.functional.cross_entropy(drafts[:, :-1].flatten(0, 1), tokens[:, 2:].flatten())
        return total

    before = loss()
    before.backward()
    square = sum(float(one.grad.square().sum()) for one in moved if one.grad is not None)
    torch.optim.SGD(moved, lr=1e-4 / square).step()
    with torch.no_grad():
        fall = float(before - loss())
    assert fall == pytest.approx(1e-4, rel=0.1)


@every_model
@torch.no_grad()
def test_a_model_survives_its_file_to_the_last_bit(config: ModelConfig, tmp_path: Path) -> None:
    model, tokens = random_model(config), draw_tokens(5, 2, 23)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "kvell"
    again = kvell.from_pretrained(tmp_path)
    assert again.config == config
    logits, streams = model(tokens, return_streams=True)
    assert torch.equal(again(tokens), logits)
    if config.draft is not None:
        drafts = [one.draft(streams, tokens)[0] for one in (model, again)]
        assert torch.equal(*drafts)


@every_model
def test_a_config_survives_json(config: ModelConfig) -> None:
    assert ModelConfig.from_dict(json.loads(config.to_json())) == config


# What layers share.

READERS = [one for one in TECHNIQUES if one.place == "attention" and one.source is not None]
every_reader = pytest.mark.parametrize("reader", [one.name for one in READERS])


def config_with(*attentions: Any) -> ModelConfig:
    """A model with a layer for each attention."""
    dense = GatedMLP(intermediate_size=24)
    parts = tuple(LayerConfig(attention=attention, feed_forward=dense) for attention in attentions)
    return ModelConfig(vocab_size=VOCAB, hidden_size=HIDDEN, max_positions=256, layers=parts)


def source_and_reader(reader: str) -> Decoder:
    """A model of two layers, of which the second reads the first."""
    source = BY_NAME[reader].source
    assert source is not None
    return random_model(config_with(BY_NAME[source].make(None), BY_NAME[reader].make(0)))


@torch.no_grad()
def read_alone(model: Decoder) -> Tensor:
    """What the second layer's attention makes of fixed input, behind a first whose input is fixed as well."""
    generator = torch.Generator().manual_seed(7)
    to_source, to_reader = (torch.randn(23, HIDDEN, generator=generator) for _ in range(2))
    step = Step.of(draw_tokens(7, 23), [23], None, model.config.reads())
    source, reader = (layer.get_submodule("attention") for layer in model.layers)
    source(to_source, step)
    return reader(to_reader, step)


GROUPED_ROWS = ["k_proj.weight", "k_norm.weight", "v_proj.weight"]
CONVOLVED_ROWS = ["k_proj.weight", "v_proj_current.weight", "v_proj_delayed.weight", "temperature"]
CONVOLVED_ROWS += ["conv_depthwise.weight", "conv_grouped.bias"]
COMPRESSED_ROWS = ["kv_proj.weight", "kv_norm.weight"]
COMPRESSED_ROWS += ["compressor.kv_proj.weight", "compressor.gate_proj.weight", "compressor.position_bias"]
READ = {
    "grouped-query of grouped-query": GROUPED_ROWS,
    "convolutional of grouped-query": GROUPED_ROWS,
    "grouped-query of convolutional": [*CONVOLVED_ROWS, "q_proj.weight"],  # a key is joined with its queries' mean
    "convolutional of convolutional": [*CONVOLVED_ROWS, "q_proj.weight"],
    "heavily compressed of the same": COMPRESSED_ROWS,
    "sparse with its source's picks": [*COMPRESSED_ROWS, "indexer.weights_proj.weight"],
    "sparse with picks of its own": COMPRESSED_ROWS,
    "every entry of a sparse one": COMPRESSED_ROWS,
}
NOT_READ = {
    "grouped-query of grouped-query": ["q_proj.weight", "o_proj.weight"],
    "convolutional of grouped-query": ["q_proj.weight", "o_proj.weight"],
    "grouped-query of convolutional": ["o_proj.weight"],
    "convolutional of convolutional": ["o_proj.weight"],
    "heavily compressed of the same": ["q_b_proj.weight", "sink", "o_b_proj.weight"],
    "sparse with its source's picks": ["q_b_proj.weight", "sink", "o_b_proj.weight"],
    "sparse with picks of its own": ["q_b_proj.weight", "indexer.weights_proj.weight"],
    "every entry of a sparse one": ["q_b_proj.weight", "indexer.weights_proj.weight"],
}


def changed(model: Decoder, name: str) -> Decoder:
    """A copy of the model with other values in one of the source's weights."""
    other = copy.deepcopy(model)
    weight = other.layers[0].get_parameter(f"attention.{name}")
    with torch.no_grad():
        weight.copy_(torch.randn_like(weight))
    return other


@every_reader
def test_a_reader_sees_its_sources_weights_and_no_others_of_its(reader: str) -> None:
    model = source_and_reader(reader)
    before = read_alone(model)
    assert torch.equal(read_alone(copy.deepcopy(model)), before)
    for name in READ[reader]:
        assert (read_alone(changed(model, name)) - before).abs().max() > 1e-3, f"{name} is not read"
    for name in NOT_READ[reader]:
        assert torch.equal(read_alone(changed(model, name)), before), f"{name} is read"


@every_reader
def test_a_reader_has_no_weights_for_what_it_reads(reader: str) -> None:
    source, own = (
        {name for name, _ in layer.get_submodule("attention").named_parameters()}
        for layer in source_and_reader(reader).layers
    )
    made = {name for name in READ[reader] if not name.startswith(("q_proj", "conv_", "indexer"))}
    assert made <= source
    assert not made & own


@every_reader
@torch.no_grad()
def test_the_last_row_of_a_reader_is_found_where_its_source_saw_all_tokens(reader: str) -> None:
    """Between them stands a layer that is the last one to need every token, so that the source makes keys, entries
    and picks for all of them and the reader, unless it remembers something itself, works on the last alone."""
    source = BY_NAME[reader].source
    assert source is not None
    model = random_model(config_with(BY_NAME[source].make(None), grouped_query(None), BY_NAME[reader].make(0)))
    tokens = draw_tokens(8, 1, 36)
    counts = [23, 13]
    whole = model(tokens, counts=counts)[0]
    assert_same(model(tokens, counts=counts, last_only=True)[0], whole[[22, 35]])


HELD = {
    "grouped-query of grouped-query": {},
    "grouped-query of convolutional": {},
    # Both kernels of 2 look back on 2 rows, kernels of 2 and 3 on 3; a row is the raw query of all heads.
    "convolutional of grouped-query": {"query_key": (2 * 8, 2)},
    "convolutional of convolutional": {"query_key": (6 * 8, 3)},
    "heavily compressed of the same": {},
    "sparse with its source's picks": {},
    # After 100 tokens 33 entries of 3; the raw rows of two windows but one, values and gates of both sets of 8.
    "sparse with picks of its own": {"index": (8, 33), "index_raw": (4 * 8, 5)},
    "every entry of a sparse one": {},
}


@every_reader
def test_a_reader_holds_nothing_of_what_it_reads(reader: str) -> None:
    """Only what its own queries or its own picks need, by width and rows after 100 tokens."""
    config = source_and_reader(reader).config
    streams = config.streams()
    held = {name: (spec.width, spec.rows(100)) for (layer, name), spec in streams.items() if layer == 1}
    assert held == HELD[reader]
    cache = source_and_reader(reader).make_cache()
    assert {name for layer, name in cache.specs if layer == 1} == set(HELD[reader])


@every_reader
def test_a_reader_may_see_less_than_its_source_holds_and_no_more(reader: str) -> None:
    """Readers of a windowed source, with its window and with less; one token more is refused."""
    source = BY_NAME[reader].source
    assert source is not None
    windowed = BY_NAME[source].make(None).model_copy(update={"sliding_window": 5})
    for window in (1, 5):
        config_with(windowed, BY_NAME[reader].make(0).model_copy(update={"sliding_window": window}))
    with pytest.raises(ConfigError, match="layer 0, whose window of 5 is shorter than this layer's 6"):
        config_with(windowed, BY_NAME[reader].make(0).model_copy(update={"sliding_window": 6}))


SPARSE_SOURCE = compressed(None, compressor=SPARSE, indexer=INDEXER)
HEAVY_SOURCE = compressed(None, compressor=HEAVY)
NARROW = {"head_dim": 4}
UNSHARABLE: dict[str, tuple[list[Any], str]] = {
    "grouped-query of compressed": (
        [HEAVY_SOURCE, grouped_query(0)],
        "cannot read layer 0, which keeps no keys and values per head",
    ),
    "convolutional of compressed": (
        [SPARSE_SOURCE, convolutional(0)],
        "cannot read layer 0, which keeps no keys and values per head",
    ),
    "compressed of convolutional": (
        [convolutional(None), compressed(0)],
        "cannot read layer 0, which is no compressed layer",
    ),
    "compressed of grouped-query": (
        [grouped_query(None), compressed(0)],
        "cannot read layer 0, which is no compressed layer",
    ),
    "grouped-query of narrower heads": (
        [grouped_query(None).model_copy(update=NARROW), grouped_query(0)],
        "cannot read layer 0, whose head_dim differs: 4, not 8",
    ),
    "convolutional of narrower heads": (
        [convolutional(None).model_copy(update=NARROW), convolutional(0)],
        "cannot read layer 0, whose head_dim differs: 4, not 8",
    ),
    "grouped-query of a narrower convolutional": (
        [convolutional(None).model_copy(update=NARROW), grouped_query(0)],
        "cannot read layer 0, whose head_dim differs: 4, not 8",
    ),
    "convolutional of a narrower grouped-query": (
        [grouped_query(None).model_copy(update=NARROW), convolutional(0)],
        "cannot read layer 0, whose head_dim differs: 4, not 8",
    ),
    "compressed of narrower heads": (
        [compressed(None).model_copy(update=NARROW), compressed(0)],
        "cannot read layer 0, whose head_dim differs: 4, not 8",
    ),
    "convolutional of another number of heads": (
        [grouped_query(None).model_copy(update={"num_kv_heads": 1}), convolutional(0)],
        "cannot read layer 0, whose num_kv_heads differs: 1, not 2",
    ),
    "convolutional of keys turned otherwise": (
        [grouped_query(None).model_copy(update={"rotary": None}), convolutional(0)],
        "cannot read layer 0, whose rotary differs: None, not ",
    ),
    "another ratio": (
        [HEAVY_SOURCE, compressed(0, compressor=Compressor(ratio=7))],
        "cannot read layer 0, whose compressor differs: ratio=5 overlap=False, not ratio=7 overlap=False",
    ),
    "overlapping windows of those that do not": (
        [HEAVY_SOURCE, compressed(0, compressor=Compressor(ratio=5, overlap=True))],
        "cannot read layer 0, whose compressor differs: ratio=5 overlap=False, not ratio=5 overlap=True",
    ),
    "entries where there are none": (
        [compressed(None), compressed(0, compressor=HEAVY)],
        "cannot read layer 0, whose compressor differs: None, not ratio=5",
    ),
    "grouped-query of a reader": (
        [grouped_query(None), grouped_query(0), grouped_query(1)],
        "layer 1, which has no keys of its own (it reads layer 0)",
    ),
    "convolutional of a reader": (
        [grouped_query(None), convolutional(0), convolutional(1)],
        "layer 1, which has no keys of its own (it reads layer 0)",
    ),
    "compressed of a reader": (
        [HEAVY_SOURCE, compressed(0, compressor=HEAVY), compressed(1, compressor=HEAVY)],
        "layer 1, which has no keys of its own (it reads layer 0)",
    ),
    "picks of a layer that makes none": (
        [HEAVY_SOURCE, compressed(0, compressor=HEAVY, source_picks=True)],
        "cannot read layer 0, which has no indexer whose picks could be taken",
    ),
    "a full layer of a windowed one": (
        [convolutional(None, sliding_window=4), grouped_query(0)],
        "cannot read layer 0, whose window of 4 is shorter than this layer's None",
    ),
    "a longer window": (
        [compressed(None), compressed(0, sliding_window=6)],
        "cannot read layer 0, whose window of 5 is shorter than this layer's 6",
    ),
}


@pytest.mark.parametrize("problem", UNSHARABLE)
def test_what_cannot_be_shared_is_refused_in_one_line_that_names_the_layers(problem: str) -> None:
    attentions, words = UNSHARABLE[problem]
    with pytest.raises(ConfigError, match=re.escape(words)) as refusal:
        config_with(*attentions)
    message = str(refusal.value)
    assert message.startswith(f"config: layers.{len(attentions) - 1}.attention.kv_source: cannot read layer ")
    assert "\n" not in message


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"source_picks": True}, "source_picks: there is no kv_source whose picks these could be"),
        (
            {"source_picks": True, "kv_source": 0, "indexer": INDEXER.model_dump()},
            "source_picks: the picks are the source's or the layer's own indexer's, not both",
        ),
    ],
)
def test_picks_that_are_nobodys_or_two_layers_are_refused_in_one_line(fields: dict[str, Any], words: str) -> None:
    values = json.loads(config_with(SPARSE_SOURCE, compressed(None, compressor=SPARSE)).to_json())
    values["layers"][1]["attention"] |= fields
    with pytest.raises(ConfigError) as refusal:
        ModelConfig.from_dict(values)
    assert str(refusal.value) == f"config: layers.1.attention: {words}"
