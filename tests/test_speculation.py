"""Speculation changes how long a text takes, and nothing else."""

import re
import time
import tracemalloc
from collections.abc import Callable, Sequence
from itertools import islice, pairwise
from typing import Any

import pytest
import torch
from generation_mocks import MockCache, MockConfig, MockDraftingModel, MockModel, byte_level_backend
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import random_model
from test_cache import small_config
from torch import Tensor

import kvell
from kvell.bundled import bundled_model_path
from kvell.config import DraftConfig
from kvell.errors import InputError, KvellError
from kvell.generation import LookupDrafter, MTPDrafter, Piece, Tokenizer, accepted_length, generate

PROMPT = [3, 1, 4, 1, 5]
TOKENIZER = Tokenizer(byte_level_backend())
EOS = 1


def seen(piece: Piece) -> tuple[int, str | None, str | None]:
    """What a reader gets of a piece, however it came about."""
    return int(piece), piece._text, piece.finish_reason


# Looking up


def looked_up(text: Sequence[int], most: int, **options: Any) -> list[int]:
    drafter = LookupDrafter(**options)
    drafter.read(text[:-1], None)
    return drafter.propose(text[-1], most)


@pytest.mark.parametrize(
    ("text", "most", "proposed"),
    [
        ([1, 2, 3, 7, 6, 1, 2, 3, 8, 9, 1, 2, 3], 3, [8, 9, 1]),
        ([1, 2, 3, 7, 6, 4, 3, 8, 1, 2, 3], 2, [7, 6]),
        ([1, 2, 7, 6, 4, 2, 8, 9, 1, 2], 3, [7, 6, 4]),
        ([5, 2, 8, 9, 4, 2], 2, [8, 9]),
        ([0, 1, 2, 3, 7, 9, 1, 2, 3, 8, 0, 1, 2, 3], 1, [8]),
        ([5, 6, 5], 6, [6, 5, 6, 5, 6, 5]),
        ([4, 4], 3, [4, 4, 4]),
        ([1, 2, 3], 4, []),
        ([1], 4, []),
    ],
    ids=[
        "what followed the latest of two occurrences",
        "three tokens count for more than one that came later",
        "two tokens count for more than one that came later",
        "a single token is better than nothing",
        "a fourth token is not looked at",
        "a repetition goes on",
        "a repetition of one token goes on",
        "nothing came before",
        "a text of one token",
    ],
)
def test_a_proposal_is_what_followed_the_last_tokens_before(text: list[int], most: int, proposed: list[int]) -> None:
    assert looked_up(text, most) == proposed


def proposal_by_scan(text: list[int], most: int, max_ngram: int) -> list[int]:
    """The same without an index: every earlier place is looked at."""
    for size in range(min(max_ngram, len(text) - 1), 0, -1):
        for start in range(len(text) - size - 1, -1, -1):
            if text[start : start + size] == text[-size:]:
                proposal = list(text)
                for _ in range(most):
                    proposal.append(proposal[start + size + len(proposal) - len(text)])
                return proposal[len(text) :]
    return []


@settings(deadline=None)
@given(
    chunks=st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=12), min_size=1, max_size=6),
    max_ngram=st.integers(1, 4),
    most=st.integers(1, 9),
)
def test_the_index_finds_what_a_scan_finds(chunks: list[list[int]], max_ngram: int, most: int) -> None:
    drafter = LookupDrafter(max_ngram)
    text: list[int] = []
    for chunk in chunks:
        for last in chunk[:1], chunk:  # what was only proposed after leaves nothing behind
            drafter.propose(last[-1], most)
        drafter.read(chunk, None)
        text += chunk
    for last in range(4):
        assert drafter.propose(last, most) == proposal_by_scan([*text, last], most, max_ngram)


def test_a_lookup_in_a_long_text_costs_what_one_in_a_short_text_does() -> None:
    def seconds(size: int) -> float:
        drafter = LookupDrafter()
        drafter.read(list(range(size)), None)
        durations = []
        for _ in range(50):
            start = time.perf_counter()
            drafter.propose(-1, 8)  # which is nowhere: a scan would go through all the text
            drafter.read([3], None)
            durations.append(time.perf_counter() - start)
        return min(durations)

    assert seconds(100_000) < 20 * seconds(100)


def test_what_a_lookup_remembers_takes_few_bytes_a_token() -> None:
    """Every n-gram of this text is another. Four bytes for the token, and in three tables a position of four bytes in
    a slot of which a third to two thirds are taken: 4 + 3 x 4 x 3 = 40 at most."""
    text = torch.randperm(30_000).tolist()
    tracemalloc.start()
    drafter = LookupDrafter()
    drafter.read(text, None)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 45 * len(text)
    assert drafter.propose(text[20_000], 4) == text[20_001:20_005]


# The same text


@settings(max_examples=60, deadline=None)
@given(
    wrong=st.sets(st.integers(0, 60)),
    num_drafts=st.integers(1, 6),
    max_new_tokens=st.integers(1, 40),
    prompt=st.lists(st.integers(0, 49), min_size=1, max_size=9),
    prefill_chunk=st.integers(1, 10),
    temperature=st.sampled_from([0.0, 0.2, 1.0]),
    eos=st.sets(st.integers(0, 49), max_size=2),
)
def test_drafts_right_and_wrong_change_nothing(
    wrong: set[int],
    num_drafts: int,
    max_new_tokens: int,
    prompt: list[int],
    prefill_chunk: int,
    temperature: float,
    eos: set[int],
) -> None:
    model = MockDraftingModel(MockConfig(eos_token_ids=tuple(eos)), wrong)
    common: Any = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": 7}
    expected = list(generate(model, prompt, **common))
    cache = MockCache(max_rewind=num_drafts)
    pieces = list(
        generate(
            model, prompt, **common, speculate="mtp", num_drafts=num_drafts, cache=cache, prefill_chunk=prefill_chunk
        )
    )
    assert [seen(piece) for piece in pieces] == [seen(piece) for piece in expected]
    assert cache.tokens == prompt + expected[:-1]
    if not temperature:
        # A greedy step ends at a draft that is wrong, and one after the last, within the text.
        drafted = [False] * len(pieces)
        place = 1
        while place < len(pieces):
            room = min(num_drafts, max_new_tokens - place - 1)
            while room and len(prompt) + place not in wrong and int(expected[place]) not in eos:
                drafted[place] = True
                place, room = place + 1, room - 1
            place += 1
        assert [piece.drafted for piece in pieces] == drafted


def test_the_draft_block_sees_every_position_once_with_the_models_own_streams() -> None:
    model = MockDraftingModel(MockConfig(), wrong={9, 10, 14})
    pieces = list(generate(model, PROMPT, 20, speculate="mtp", num_drafts=3, prefill_chunk=2))
    pairs = [(token, following, 0) for token, following in pairwise(PROMPT + pieces)]
    rows = model.draft_cache.tokens
    assert rows == pairs[: len(rows)]
    assert len(rows) >= len(pairs) - 4, "up to the last step that drafted"
    assert model.draft_cache.max_rewind == 2, "the first of three drafts comes from the model's own streams"


def test_a_draft_block_that_is_always_right_makes_each_step_give_one_token_more_than_it_drafts() -> None:
    cache = MockCache(max_rewind=3)
    model = MockDraftingModel(MockConfig())
    pieces = list(generate(model, PROMPT, 13, speculate="mtp", cache=cache))
    assert cache.chunks == [len(PROMPT), 4, 4, 4]
    assert [piece.drafted for piece in pieces] == [False, *[True, True, True, False] * 3]
    assert accepted_length(pieces) == 4


def test_a_draft_block_that_is_always_wrong_makes_each_step_give_one_token() -> None:
    cache = MockCache(max_rewind=3)
    model = MockDraftingModel(MockConfig(), wrong=range(1000))
    pieces = list(generate(model, PROMPT, 7, speculate="mtp", cache=cache))
    assert cache.chunks == [len(PROMPT), 4, 4, 4, 3, 2, 1], "no more is drafted than can still be used"
    assert not any(piece.drafted for piece in pieces)
    assert accepted_length(pieces) == 1


# Proposals of tiny random models, and of a trained one


@pytest.fixture
def proposed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens each lookup has proposed."""
    amounts: list[int] = []
    propose = LookupDrafter.propose

    def counting(drafter: LookupDrafter, last: int, most: int) -> list[int]:
        drafts = propose(drafter, last, most)
        amounts.append(len(drafts))
        return drafts

    monkeypatch.setattr(LookupDrafter, "propose", counting)
    return amounts


SAMPLINGS: list[dict[str, Any]] = [{}, {"temperature": 0.7, "top_k": 3, "seed": 5}]


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["greedy", "sampled"])
@pytest.mark.parametrize("num_drafts", [1, 3, 12])
@pytest.mark.parametrize("windows", [(7, None), (2,), (5, 3)])
def test_a_real_model_says_the_same_by_lookup(
    windows: tuple[int | None, ...], num_drafts: int, sampling: dict[str, Any], proposed: list[int]
) -> None:
    model = random_model(small_config(*windows))
    prompt = torch.randint(0, 31, (6,)).tolist() * 4
    expected = list(generate(model, prompt, 60, **sampling))
    cache = model.make_cache(max_rewind=num_drafts)
    speculation: Any = {"speculate": "lookup", "num_drafts": num_drafts, **sampling}
    pieces = list(generate(model, prompt, 60, cache=cache, prefill_chunk=7, **speculation))
    assert [seen(piece) for piece in pieces] == [seen(piece) for piece in expected]
    accepted = sum(piece.drafted for piece in pieces)
    assert 0 < accepted < sum(proposed), "some drafts were right and some wrong"
    assert cache.lengths == [len(prompt) + 59]
    assert_holds(cache, model, prompt + pieces[:-1])


def assert_holds(cache: kvell.Cache, model: kvell.Decoder, tokens: list[int]) -> None:
    """The cache goes on as one that was fed these tokens and never rewound."""
    never_rewound = model.make_cache()
    more = torch.tensor([[5, 6, 7]])
    model(torch.tensor([tokens]), cache=never_rewound)
    expected = model(more, cache=never_rewound)
    torch.testing.assert_close(model(more, cache=cache.fork()), expected, atol=1e-4, rtol=1e-4)


def test_a_text_goes_on_from_the_cache_of_a_speculated_one() -> None:
    model = random_model(small_config(4, None))
    prompt = [1, 2, 3, 4] * 5
    whole = list(generate(model, prompt, 60))
    cache = model.make_cache(max_rewind=8)
    first = list(generate(model, prompt, 25, cache=cache, speculate="lookup"))
    second = list(generate(model, first[-1:], 15, cache=cache, speculate="lookup"))
    third = list(generate(model, second[-1:], 20, cache=cache))
    assert first + second + third == whole
    assert any(piece.drafted for piece in second), "it knows its own text, if not the one before"


@pytest.fixture(scope="module")
def trained() -> kvell.Decoder:
    return kvell.from_pretrained(bundled_model_path(), dtype=torch.float32)


REPETITIVE = """def left(self, x):
    self.position = x
    return self.position

def right(self, x):
    self.position = x
    return self.position

def top(self, x"""


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["greedy", "sampled"])
def test_the_bundled_model_says_the_same_in_fewer_steps(
    sampling: dict[str, Any], trained: kvell.Decoder, proposed: list[int]
) -> None:
    tokenizer = Tokenizer.from_pretrained(bundled_model_path())
    prompt = tokenizer.encode(REPETITIVE)
    common: Any = {"max_new_tokens": 60, "tokenizer": tokenizer, **sampling}
    expected = list(generate(trained, prompt, **common))
    pieces = list(generate(trained, prompt, **common, speculate="lookup"))
    assert [seen(piece) for piece in pieces] == [seen(piece) for piece in expected]
    assert 0 < sum(piece.drafted for piece in pieces) < sum(proposed)
    length = accepted_length(pieces)
    assert length is not None
    assert length > 1.3


# A real draft block


def drafting_config(*windows: int | None) -> kvell.ModelConfig:
    config = small_config(*windows)
    return config.model_copy(update={"draft": DraftConfig(layer=config.layers[0])})


def proposal_from_scratch(model: kvell.Decoder, text: list[int], most: int) -> list[int]:
    """What the draft block proposes after a text, computed without any cache, a whole sequence each time."""
    _, streams = model(torch.tensor([text[:-1]]), return_streams=True)
    following = text[1:]
    for _ in range(most):
        logits, own = model.draft(streams, torch.tensor([following]))
        following = [*following, int(logits[0, -1].argmax())]
        streams = torch.cat([streams, own[:, -1:]], dim=1)
    return following[len(text) - 1 :]


@pytest.mark.parametrize("windows", [(7, None), (3,), (None, 5)])
def test_a_real_draft_block_proposes_what_it_would_without_a_cache(
    windows: tuple[int | None, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = random_model(drafting_config(*windows))
    proposals: list[list[int]] = []
    propose = MTPDrafter.propose

    def recording(drafter: MTPDrafter, last: int, most: int) -> list[int]:
        proposals.append(propose(drafter, last, most))
        return proposals[-1]

    monkeypatch.setattr(MTPDrafter, "propose", recording)
    prompt = torch.randint(0, 31, (11,)).tolist()
    expected = list(generate(model, prompt, 30, temperature=0.5))
    cache = model.make_cache(max_rewind=3)
    pieces = list(generate(model, prompt, 30, temperature=0.5, cache=cache, speculate="mtp", prefill_chunk=4))
    assert [seen(piece) for piece in pieces] == [seen(piece) for piece in expected]
    assert_holds(cache, model, prompt + pieces[:-1])
    ends = [index for index, piece in enumerate(pieces) if not piece.drafted][: len(proposals)]
    assert len(proposals) > 5
    with torch.no_grad():
        for end, proposal in zip(ends, proposals, strict=True):
            text = prompt + [int(piece) for piece in pieces[: end + 1]]
            assert proposal == proposal_from_scratch(model, text, len(proposal))


# How a text ends


SAID = TOKENIZER.encode(" sat on the mat, and the dog did not sit on the cat")


def reciting(eos_token_ids: tuple[int, ...] = (), ending: Sequence[int] = ()) -> tuple[MockModel, list[int]]:
    """A model that says again what its prompt begins with, and the prompt: drafts are right as far as that goes."""
    prompt = [*TOKENIZER.encode("the cat"), *SAID, *TOKENIZER.encode("END the cat")]
    size = TOKENIZER._backend.get_vocab_size()
    config = MockConfig(vocab_size=size, eos_token_ids=eos_token_ids, max_positions=10_000)
    return MockModel(config, [*SAID, *ending], len(prompt)), prompt


def ended(
    model: MockModel, prompt: list[int], num_drafts: int = 6, **settings: Any
) -> tuple[list[Piece], list[int], MockCache]:
    """A text's pieces and its cache, after checking that both are what they are without speculation."""
    plain, cache = MockCache(), MockCache(max_rewind=num_drafts)
    settings = {"tokenizer": TOKENIZER, **settings}
    expected = list(generate(model, prompt, cache=plain, **settings))
    pieces = list(generate(model, prompt, cache=cache, speculate="lookup", num_drafts=num_drafts, **settings))
    assert [seen(piece) for piece in pieces] == [seen(piece) for piece in expected]
    assert cache.tokens == plain.tokens == prompt + pieces[:-1]
    return pieces, cache.chunks[1:], cache


@pytest.mark.parametrize("max_new_tokens", range(1, len(SAID) + 1))
def test_max_new_tokens_ends_the_text_wherever_it_falls(max_new_tokens: int) -> None:
    pieces, chunks, _ = ended(*reciting(), max_new_tokens=max_new_tokens)
    assert (len(pieces), pieces[-1].finish_reason) == (max_new_tokens, "length")
    assert sum(chunks) == max_new_tokens - 1, "all drafts are right, and not one is too many"


@pytest.mark.parametrize("place", range(1, len(SAID)))
def test_a_stop_string_ends_the_text_among_accepted_drafts(place: int) -> None:
    """The stop string is the rest of the text from somewhere on, as far as the next token goes."""
    stop = TOKENIZER.decode(SAID[place : place + 1])
    pieces, _, _ = ended(*reciting(), stop=stop)
    shown = "".join(piece.text for piece in pieces)
    assert shown == TOKENIZER.decode(SAID).split(stop)[0]
    assert pieces[-1].finish_reason == "stop"


def test_what_was_read_beyond_a_stop_string_is_forgotten_before_its_piece_comes() -> None:
    model, prompt = reciting()
    cache = MockCache(max_rewind=8)
    stop = TOKENIZER.decode(SAID[3:4])
    pieces = generate(model, prompt, cache=cache, speculate="lookup", stop=stop, tokenizer=TOKENIZER)
    given = [next(pieces)]
    while given[-1].finish_reason is None:
        given.append(next(pieces))
    assert given[-1].drafted
    assert cache.chunks[-1] > 4, "more was read"
    assert cache.tokens == prompt + given[:-1]


@pytest.mark.parametrize("place", range(len(SAID)))
def test_an_end_token_ends_the_text_wherever_it_falls(place: int) -> None:
    """The prompt did not end there: the end token is no draft, and the drafts behind it are dropped."""
    model, prompt = reciting(eos_token_ids=(EOS,))
    model.script[place] = EOS
    pieces, _, _ = ended(model, prompt)
    assert (len(pieces), pieces[-1], pieces[-1].finish_reason) == (place + 1, EOS, "eos")


def test_nothing_is_drafted_from_an_end_token_on() -> None:
    """The prompt has an end token where the text will: all before it is drafted, in one step."""
    model, prompt = reciting(eos_token_ids=(SAID[4],))
    pieces, chunks, _ = ended(model, prompt)
    assert (len(pieces), pieces[-1].finish_reason) == (5, "eos")
    assert chunks == [4]
    assert [piece.drafted for piece in pieces] == [False, True, True, True, False]


def test_a_stop_string_and_the_length_may_come_with_drafts_that_are_wrong() -> None:
    model, prompt = reciting()
    model.script[2::3] = [token + 1 for token in model.script[2::3]]
    for count in range(1, len(SAID)):
        pieces, _, _ = ended(model, prompt, max_new_tokens=count)
        assert len(pieces) == count


@pytest.mark.parametrize("count", range(1, 15))
def test_a_text_that_is_left_where_it_is_leaves_the_cache_at_its_last_token(count: int) -> None:
    model, prompt = reciting()
    cache = MockCache(max_rewind=8)
    pieces = generate(model, prompt, cache=cache, speculate="lookup")
    taken = list(islice(pieces, count))
    pieces.close()
    assert cache.tokens == prompt + taken[:-1]


def test_logits_that_are_no_numbers_end_the_text_where_they_come() -> None:
    """The tokens before them are yielded, as without speculation, and the cache holds no more than these."""
    model, prompt = reciting()
    logits: Callable[[Sequence[int]], Tensor] = model.logits
    model.logits = lambda tokens: logits(tokens) * (1 if len(tokens) < len(prompt) + 4 else torch.nan)
    cache = MockCache(max_rewind=8)
    pieces = generate(model, prompt, cache=cache, speculate="lookup")
    taken = [next(pieces) for _ in range(4)]
    assert len(cache.tokens) > len(prompt) + 4, "what is behind them has been read"
    with pytest.raises(KvellError, match="the model's highest logit is nan"):
        next(pieces)
    assert taken == SAID[:4]
    assert cache.tokens == prompt + taken


def test_a_step_that_fails_says_why_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """And not that the cache, whose layers no longer agree, cannot be rewound."""
    model = random_model(small_config(7, None))
    cache = model.make_cache(max_rewind=8)
    pieces = generate(model, [1, 2, 3, 4] * 5, cache=cache, speculate="lookup")
    next(pieces)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(model.layers[1].feed_forward, "forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(pieces)


def test_a_reserved_cache_is_not_asked_for_more_than_the_text_takes() -> None:
    model, prompt = reciting(eos_token_ids=(EOS,), ending=[EOS])
    fits = len(prompt) + len(SAID)
    cache = MockCache(max_rewind=6, max_length=fits)
    pieces = list(generate(model, prompt, cache=cache, speculate="lookup", num_drafts=6))
    assert [int(piece) for piece in pieces] == [*SAID, EOS]
    assert len(cache.tokens) == fits


# What is refused, and what is counted


def test_a_draft_block_cannot_continue_what_it_has_not_seen() -> None:
    model = MockDraftingModel(MockConfig())
    message = "the cache holds 2 tokens that the draft block has not seen"
    with pytest.raises(InputError, match=message):
        generate(model, PROMPT, speculate="mtp", cache=MockCache([1, 2], max_rewind=3))
    assert list(generate(model, PROMPT, 4, speculate="lookup", cache=MockCache([1, 2], max_rewind=8)))
    assert list(generate(model, PROMPT, 4, cache=MockCache([1, 2])))


def test_a_decoder_without_a_draft_block_says_what_it_would_need() -> None:
    model = random_model(small_config(7))
    with pytest.raises(InputError, match=re.escape("this one has none (its config's draft is null)")):
        generate(model, PROMPT, speculate="mtp")


def test_a_cache_with_just_enough_to_take_back_is_taken() -> None:
    model = random_model(small_config(3))
    with pytest.raises(InputError, match="max_rewind=3, and 4 drafts a step need max_rewind=4"):
        generate(model, PROMPT, speculate="lookup", num_drafts=4, cache=model.make_cache(max_rewind=3))
    with pytest.raises(InputError, match="max_rewind=2, and 3 drafts"):
        generate(
            MockDraftingModel(MockConfig()), PROMPT, speculate="mtp", cache=MockCache(max_rewind=2)
        )  # the default
    cache = model.make_cache(max_rewind=4)
    pieces = generate(model, PROMPT * 3, 40, speculate="lookup", num_drafts=4, cache=cache)
    assert list(pieces) == list(generate(model, PROMPT * 3, 40))


@pytest.mark.parametrize(
    ("drafted", "length"),
    [
        ([False], None),
        ([False, False], 1),
        ([False, True, True, False], 3),
        ([False, True, True], 2),
        ([False, False, True, False, False, True, True], 6 / 4),
    ],
)
def test_the_accepted_length_is_tokens_per_step(drafted: list[bool], length: float | None) -> None:
    assert accepted_length([Piece(5, drafted=one) for one in drafted]) == length
