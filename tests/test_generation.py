"""Continuing a prompt."""

import pickle
from typing import Any

import pytest
import torch
from generation_mocks import MockCache, MockConfig, MockModel, byte_level_backend

from kvell import Decoder, ModelConfig
from kvell.config import LayerConfig
from kvell.errors import InputError
from kvell.generation import Piece, Tokenizer, generate
from kvell.layers.feed_forward import GatedMLP
from kvell.layers.grouped_query import GroupedQuery
from kvell.layers.rotary import DefaultRotary

PROMPT = [3, 1, 4, 1, 5]
TOKENIZER = Tokenizer(byte_level_backend())
VOCABULARY = TOKENIZER._backend.get_vocab_size()
EOS = TOKENIZER.special_token_id("<eos>")


def model_saying(text: str, **config: Any) -> MockModel:
    """A model that answers a prompt of one token with `text`."""
    ids = TOKENIZER.encode(text, parse_special_tokens=True)
    return MockModel(MockConfig(vocab_size=VOCABULARY, eos_token_ids=(EOS,), **config), ids)


def said(text: str, **settings: Any) -> list[Piece]:
    return list(generate(model_saying(text), [5], tokenizer=TOKENIZER, **settings))


def text_of(pieces: list[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


def test_tokens_are_those_of_a_loop_written_by_hand() -> None:
    model = MockModel(MockConfig())
    cache, tokens, expected = MockCache(), PROMPT, []
    for _ in range(20):
        logits = model(torch.tensor([tokens]), cache=cache, last_only=True)
        tokens = [int(logits.argmax())]
        expected += tokens
    assert list(generate(model, PROMPT, max_new_tokens=20)) == expected


def test_a_piece_is_its_token_and_more() -> None:
    (piece,) = generate(MockModel(MockConfig(), [7], len(PROMPT)), PROMPT, max_new_tokens=1)
    assert piece == 7
    assert {7: "seven"}[piece] == "seven"
    assert (piece.finish_reason, piece.drafted) == ("length", False)
    assert repr(piece) == "Piece(7, finish_reason='length', drafted=False)"
    assert repr(said("s", max_new_tokens=1)[0]).endswith(", text='s', finish_reason='length', drafted=False)")
    copy = pickle.loads(pickle.dumps(Piece(7, "seven", "length", drafted=True)))
    assert (copy, copy.text, copy.finish_reason, copy.drafted) == (7, "seven", "length", True)


def test_a_real_model_says_what_its_whole_forward_says() -> None:
    own = GroupedQuery(num_heads=2, num_kv_heads=1, head_dim=8, rotary=DefaultRotary(theta=1e4), sliding_window=4)
    shared = own.model_copy(update={"kv_source": 0})
    layers = [LayerConfig(attention=part, feed_forward=GatedMLP(intermediate_size=32)) for part in (own, shared)]
    config = ModelConfig(vocab_size=50, hidden_size=16, max_positions=99, layers=layers, initializer_range=0.5)
    model = Decoder(config)
    tokens = [*PROMPT]
    for _ in range(20):
        tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    assert PROMPT + list(generate(model, PROMPT, 20, prefill_chunk=3)) == tokens


@pytest.mark.parametrize("prompt", [PROMPT, tuple(PROMPT), torch.tensor(PROMPT), torch.tensor(PROMPT).int()])
def test_a_prompt_may_be_a_sequence_or_a_tensor(prompt: Any) -> None:
    model = MockModel(MockConfig())
    assert list(generate(model, prompt)) == list(generate(model, PROMPT))


@pytest.mark.parametrize("chunk", [1, 2, 4, 5, 6])
def test_the_prompt_is_fed_in_chunks_that_change_nothing(chunk: int) -> None:
    model, cache, fed = MockModel(MockConfig()), MockCache(), []
    pieces = generate(model, PROMPT, 3, cache=cache, prefill_chunk=chunk, on_prefill=fed.append)
    assert list(pieces) == list(generate(model, PROMPT, 3))
    chunks = [len(PROMPT[start : start + chunk]) for start in range(0, len(PROMPT), chunk)]
    assert cache.chunks == [*chunks, 1, 1], "the last token is not fed"
    assert fed == [sum(chunks[: count + 1]) for count in range(len(chunks))]


def test_a_prompt_continues_what_the_cache_holds() -> None:
    model, cache = MockModel(MockConfig()), MockCache()
    whole = list(generate(model, PROMPT, 10))
    first = list(generate(model, PROMPT, 4, cache=cache))
    assert cache.tokens == PROMPT + first[:-1]
    assert first + list(generate(model, first[-1:], 6, cache=cache)) == whole


def test_each_token_is_yielded_before_the_next_is_computed() -> None:
    cache = MockCache()
    pieces = generate(MockModel(MockConfig()), PROMPT, cache=cache)
    assert cache.tokens == [], "nothing is computed before it is asked for"
    next(pieces)
    assert len(cache.tokens) == len(PROMPT)
    next(pieces)
    assert len(cache.tokens) == len(PROMPT) + 1


def test_equal_seeds_give_equal_tokens_and_others_do_not() -> None:
    model = MockModel(MockConfig())

    def tokens(**settings: Any) -> list[Piece]:
        return list(generate(model, PROMPT, 30, temperature=1.0, **settings))

    assert tokens(seed=1) == tokens(seed=1) != tokens(seed=2)
    assert tokens(top_k=1) == tokens(top_p=1e-9) == tokens(min_p=1.0) == list(generate(model, PROMPT, 30))


# How a text ends


def test_an_end_token_is_yielded_without_text() -> None:
    pieces = said("the cat<eos> sat")
    assert text_of(pieces) == "the cat"
    assert (pieces[-1], pieces[-1].text) == (EOS, "")
    assert [piece.finish_reason for piece in pieces] == [None] * (len(pieces) - 1) + ["eos"]


def test_an_end_token_ends_the_text_without_a_tokenizer_too() -> None:
    pieces = list(generate(model_saying("the cat<eos>"), [5]))
    assert pieces == [*TOKENIZER.encode("the cat"), EOS]
    assert pieces[-1].finish_reason == "eos"
    with pytest.raises(InputError, match="give it tokenizer="):
        _ = pieces[0].text


def test_an_end_token_that_has_a_text_does_not_show_it() -> None:
    model = model_saying("the cat")
    (end,) = TOKENIZER.encode("t")
    model.config = MockConfig(VOCABULARY, eos_token_ids=(EOS, end))
    model.script = [*TOKENIZER.encode("ca"), end]
    assert text_of(list(generate(model, [5], tokenizer=TOKENIZER))) == "ca"


def test_max_new_tokens_ends_the_text() -> None:
    pieces = said("the cat sat on the mat", max_new_tokens=3)
    assert len(pieces) == 3
    assert [piece.finish_reason for piece in pieces] == [None, None, "length"]


def test_a_character_cut_off_by_the_length_is_shown_as_such() -> None:
    size = len(TOKENIZER.encode("a🦔"))
    assert text_of(said("a🦔", max_new_tokens=size)) == "a🦔"
    pieces = said("a🦔", max_new_tokens=size - 1)
    assert [piece.text for piece in pieces][:2] == ["a", ""]
    assert text_of(pieces) == "a\N{REPLACEMENT CHARACTER}"


def test_a_stop_string_across_tokens_is_not_shown() -> None:
    text = "the dog\n\nEND of it"
    pieces = said(text, stop=["\n\nEND"])
    assert (text_of(pieces), pieces[-1].finish_reason) == ("the dog", "stop")
    assert len(pieces) < len(TOKENIZER.encode(text)), "nothing is computed after it"
    assert text_of(said("the dog END", stop=" END")) == "the dog", "a single one needs no list"


@pytest.mark.parametrize("ending", ["<eos>", ""])
def test_the_beginning_of_a_stop_string_is_shown_when_the_text_ends_there(ending: str) -> None:
    size = len(TOKENIZER.encode("the EN" + ending, parse_special_tokens=True))
    pieces = said("the EN" + ending, stop=["END"], max_new_tokens=size)
    assert text_of(pieces) == "the EN"
    assert pieces[-1].finish_reason == ("eos" if ending else "length")


def test_a_stop_string_in_the_last_token_is_the_reason_given() -> None:
    size = len(TOKENIZER.encode("the END"))
    pieces = said("the END", stop=["END"], max_new_tokens=size)
    assert (text_of(pieces), pieces[-1].finish_reason) == ("the ", "stop")


def test_a_special_token_may_be_a_stop_string() -> None:
    pieces = said("the<bos> cat", stop=["<bos>"])
    assert (text_of(pieces), pieces[-1].finish_reason) == ("the", "stop")


# What is refused, at once


WRONG_CALLS: dict[str, tuple[Any, dict[str, Any], str]] = {
    "empty prompt": ([], {}, "the prompt is empty"),
    "empty tensor": (torch.tensor([]), {}, "the prompt is empty"),
    "id beyond the vocabulary": ([3, 50], {}, "token id 50 is outside the vocabulary of 50"),
    "negative id": ([3, -1], {}, "token id -1 is outside the vocabulary of 50"),
    "id beyond 64 bits": ([2**70], {}, "the prompt is not a sequence of token ids"),
    "text": ("Once", {}, r"the prompt is text, and generate takes token ids: tokenizer.encode\(text\) makes them"),
    "batch": (torch.tensor([PROMPT]), {}, r"of shape \(1, 5\), not one row"),
    "floats": (torch.tensor([1.0]), {}, r"the prompt is torch.float32"),
    "max_new_tokens": (PROMPT, {"max_new_tokens": 0}, "max_new_tokens must be at least 1, not 0"),
    "prefill_chunk": (PROMPT, {"prefill_chunk": 0}, "prefill_chunk must be at least 1, not 0"),
    "temperature": (PROMPT, {"temperature": -1.0}, "temperature -1.0 is"),
    "top_k": (PROMPT, {"top_k": 0}, "top_k must be at least 1, not 0"),
    "top_p": (PROMPT, {"top_p": 0.0}, "top_p 0.0 is"),
    "min_p": (PROMPT, {"min_p": 2.0}, "min_p 2.0 is"),
    "half a token": (PROMPT, {"max_new_tokens": 1.5}, "max_new_tokens must be a whole number, not 1.5"),
    "half a seed": (PROMPT, {"seed": 1.5}, "seed must be a whole number, not 1.5"),
    "a seed too large": (PROMPT, {"seed": 2**64}, f"seed must be at most {2**64 - 1}, not {2**64}"),
    "no temperature": (PROMPT, {"temperature": None}, "temperature must be a number, not None"),
    "a warm text": (PROMPT, {"temperature": "warm"}, "temperature must be a number, not 'warm'"),
    "stop without tokenizer": (PROMPT, {"stop": ["END"]}, "stop strings need a tokenizer"),
    "empty stop": (PROMPT, {"stop": ["END", ""], "tokenizer": TOKENIZER}, "a stop string is empty"),
    "batch cache": (PROMPT, {"cache": MockCache(batch_size=2)}, "the cache holds 2 sequences"),
    "speculate": (PROMPT, {"speculate": "fast"}, "speculate fast is unknown: use one of off, lookup, mtp"),
    "num_drafts": (
        PROMPT,
        {"speculate": "lookup", "num_drafts": 0},
        "the number of drafts must be at least 1, not 0",
    ),
    "drafts nobody makes": (PROMPT, {"num_drafts": 3}, "3 drafts are asked for, but speculate is off"),
    "cache that cannot go back": (
        PROMPT,
        {"speculate": "lookup", "cache": MockCache(max_rewind=7)},
        "the cache was made with max_rewind=7, and 8 drafts a step need max_rewind=8",
    ),
    "no draft block": (PROMPT, {"speculate": "mtp"}, 'needs a model with a draft block.*"lookup" works for every'),
}


@pytest.mark.parametrize(("prompt", "settings", "message"), WRONG_CALLS.values(), ids=WRONG_CALLS.keys())
def test_wrong_input_is_an_error_of_one_line_at_the_call(prompt: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        generate(MockModel(MockConfig()), prompt, **settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("held", "new_tokens", "warns"), [(0, 5, False), (0, 6, True), (1, 5, True)])
def test_a_text_longer_than_the_model_was_made_for_is_a_warning(
    held: int, new_tokens: int, warns: bool, recwarn: pytest.WarningsRecorder
) -> None:
    model = MockModel(MockConfig(max_positions=10))
    pieces = generate(model, PROMPT, new_tokens, cache=MockCache([1] * held))
    assert [str(warning.message)[:31] for warning in recwarn] == ["the text may reach 11 tokens an"] * warns
    assert len(list(pieces)) == new_tokens
