"""Generated tasks: every answer follows from what stands before it, and evaluation counts what a model gets right."""

import contextlib
import random
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from kvell import Cache, ConfigError, InputError, Tokenizer
from kvell.bundled import bundled_model_path
from kvell.training.tasks import (
    NAMES,
    Accuracy,
    AssociativeRecall,
    Example,
    Induction,
    Needle,
    Needles,
    Passkey,
    Task,
    accuracy_by_distance,
    batch_of,
    line_breaks,
    solved,
)

TOKENIZER = Tokenizer.from_pretrained(bundled_model_path())
SOURCE = (
    'import os\n\n\nclass Thing:\n    """A thing."""\n\n    def of(self, name):\n        return os.path.join(name)\n'
) * 40


def encode(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False)


HAYSTACK = encode(SOURCE)
LINE = r"# The pass key is [1-9]\d{4}\. Remember it\."


def after_the_same_token(before: list[int]) -> tuple[int, int]:
    """What followed the last token where it stood first, and how far back from the next token that is."""
    followers: dict[int, int] = {}
    for place, token in enumerate(before[:-1]):
        followers.setdefault(token, place + 1)
    source = followers[before[-1]]
    return before[source], len(before) - source


def after_the_same_marked_key(before: list[int]) -> tuple[int, int]:
    """The same for a key that stands behind a mark."""
    source = next(place for place in range(2, len(before)) if before[place - 2 : place] == before[-2:])
    return before[source], len(before) - source


@st.composite
def recalls(draw: st.DrawFn) -> AssociativeRecall:
    pairs = draw(st.integers(1, 8))
    vocab_size, length = draw(st.integers(2 * pairs + 1, 64)), draw(st.integers(4 * pairs, 80))
    return AssociativeRecall(vocab_size=vocab_size, length=length, num_pairs=pairs)


@st.composite
def inductions(draw: st.DrawFn) -> Induction:
    length = draw(st.integers(4, 60))
    most = length // 2 - 1
    span = draw(st.none() | st.integers(1, most))
    vocab_size = draw(st.integers(2 + (most if span is None else span), 64))
    return Induction(vocab_size=vocab_size, length=length, span=span)


@st.composite
def needles(draw: st.DrawFn) -> Needle:
    others = draw(st.integers(0, 6))
    vocab_size, length = draw(st.integers(3 * others + 4, 64)), draw(st.integers(3 * others + 6, 80))
    return Needle(vocab_size=vocab_size, length=length, num_distractors=others)


SOLVERS: dict[str, Callable[[list[int]], tuple[int, int]]] = {
    "associative_recall": after_the_same_token,
    "induction": after_the_same_token,
    "needle": after_the_same_marked_key,
}
ANSWERS: dict[str, Callable[[Any], int]] = {
    "associative_recall": lambda task: task.num_pairs,
    "induction": lambda task: task.length // 2 - 1 if task.span is None else task.span,
    "needle": lambda task: 1,
}
SEEDS = st.integers(0, 2**32)


@settings(max_examples=500, deadline=None)
@given(st.one_of(recalls(), inductions(), needles()), SEEDS)
def test_a_lookup_in_what_stands_before_gives_every_answer_and_its_distance(task: Any, seed: int) -> None:
    example = task.draw(random.Random(seed))
    assert len(example.tokens) == task.length
    assert all(0 <= token < task.vocab_size for token in example.tokens)
    assert len(example.scored) == ANSWERS[task.kind](task)
    for place, distance in zip(example.scored, example.distances, strict=True):
        assert SOLVERS[task.kind](example.tokens[:place]) == (example.tokens[place], distance)
    assert task.draw(random.Random(seed)) == example


@settings(max_examples=200, deadline=None)
@given(recalls(), SEEDS)
def test_keys_and_values_are_of_different_halves_of_the_vocabulary(task: AssociativeRecall, seed: int) -> None:
    example = task.draw(random.Random(seed))
    pairs = example.tokens[: 2 * task.num_pairs]
    half = (task.vocab_size - 1) // 2
    assert all(1 <= key <= half for key in pairs[::2])
    assert all(half < value <= 2 * half for value in pairs[1::2])
    assert len(set(pairs[::2])) == task.num_pairs
    asked = [example.tokens[place - 1] for place in example.scored]
    assert sorted(asked) == sorted(pairs[::2])
    between = {place for answer in example.scored for place in (answer - 1, answer)} | set(range(len(pairs)))
    assert all(token == 0 for place, token in enumerate(example.tokens) if place not in between)


def test_queries_come_in_every_order_and_place() -> None:
    task = AssociativeRecall(vocab_size=9, length=10, num_pairs=2)
    rng = random.Random(0)
    drawn = {(tuple(e.scored), tuple(e.distances)) for e in (task.draw(rng) for _ in range(300))}
    places = [(5, 7), (5, 8), (5, 9), (6, 8), (6, 9), (7, 9)]
    assert drawn == {
        (place, tuple(at - source for at, source in zip(place, sources, strict=True)))
        for place in places
        for sources in ((1, 3), (3, 1))
    }


def test_the_needle_stands_among_pairs_of_its_own_form() -> None:
    task = Needle(vocab_size=31, length=40, num_distractors=4)
    example = task.draw(random.Random(3))
    marks = [place for place, token in enumerate(example.tokens) if token == 0]
    assert len(marks) == 6
    keys, values = ([example.tokens[mark + step] for mark in marks[:-1]] for step in (1, 2))
    assert len(set(keys)) == len(set(values)) == 5
    assert all(1 <= key <= 10 for key in keys)
    assert all(11 <= value <= 20 for value in values)
    inside = {mark + step for mark in marks for step in range(3)}
    assert all(token > 20 for place, token in enumerate(example.tokens) if place not in inside)


def answer_in(text: str) -> str:
    """The number that the question at the end of a text asks for."""
    body, question = text.rsplit("\n", 1)
    name = re.fullmatch(r"# What is the pass key((?: of \w+)?)\? The pass key\1 is", question)
    assert name is not None
    found = re.findall(rf"^# The pass key{name[1]} is( [1-9]\d{{4}})\.(?: Remember it\.)?$", body, re.M)
    assert len(found) == 1
    return str(found[0])


TEXT_TASKS = st.one_of(
    st.builds(Passkey, length=st.integers(60, 900), depth=st.none() | st.floats(0, 1)),
    st.builds(
        Needles, length=st.integers(180, 900), depth=st.none() | st.floats(0, 1), num_needles=st.integers(1, 5)
    ),
)


@settings(max_examples=300, deadline=None)
@given(TEXT_TASKS, SEEDS, st.sampled_from([None, 0]))
def test_a_search_in_the_text_gives_the_answer(task: Any, seed: int, bos: int | None) -> None:
    example = task.draw(random.Random(seed), HAYSTACK, encode, bos)
    assert len(example.tokens) == task.length
    assert (example.tokens[0] == 0) is (bos == 0)
    assert example.scored == list(range(example.scored[0], task.length))
    prompt = example.tokens[: example.scored[0]]
    expected = answer_in(TOKENIZER.decode(prompt))
    assert TOKENIZER.decode(example.tokens[example.scored[0] :]) == expected
    for place, distance in zip(example.scored, example.distances, strict=True):
        assert example.tokens[place - distance] == example.tokens[place]
    start = example.scored[0] - example.distances[0]
    before, after = TOKENIZER.decode(example.tokens[:start]), TOKENIZER.decode(example.tokens[start:])
    assert re.search(r"# The pass key( of \w+)? is$", before)
    assert after.startswith(expected + ".")
    assert task.draw(random.Random(seed), HAYSTACK, encode, bos) == example


@pytest.mark.parametrize("depth", [0.0, 0.01, 0.25, 0.5, 0.99, 1.0])
def test_the_line_stands_whole_between_whole_lines_at_its_depth(depth: float) -> None:
    task = Passkey(length=600, depth=depth)
    for seed in range(20):
        example = task.draw(random.Random(seed), HAYSTACK, encode)
        lines = TOKENIZER.decode(example.tokens).split("\n")
        place = next(place for place, line in enumerate(lines) if re.fullmatch(LINE, line))
        # Without it the haystack is as it was, up to where it was cut.
        assert SOURCE.startswith("\n".join([*lines[:place], *lines[place + 1 : -1]]))
        line = len(encode("\n# The pass key is 12345. Remember it."))
        room = task.length - line - len(encode("\n# What is the pass key? The pass key is 12345"))
        start = example.scored[0] - example.distances[0] - len(encode("\n# The pass key is"))
        assert abs(start - depth * room) <= 10


def letters(text: str) -> list[int]:
    return [ord(letter) for letter in text]


@pytest.mark.parametrize(
    ("depth", "expected"),
    [
        (0, ["one", "HERE", "two", "three"]),
        (0.5, ["one", "two", "HERE", "three"]),
        (1, ["one", "two", "three", "HERE"]),
    ],
)
def test_depth_zero_is_the_first_line_boundary_and_depth_one_the_end(depth: float, expected: list[str]) -> None:
    text = "one\ntwo\nthree"
    hidden = "\n# The pass key is 12345. Remember it.", "\n# What is the pass key? The pass key is 12345"
    task = Passkey(length=len(text) + sum(map(len, hidden)), depth=depth)
    example = task.draw(random.Random(0), letters(text), letters)
    lines = "".join(map(chr, example.tokens)).split("\n")
    assert [re.sub(LINE, "HERE", line) for line in lines[:-1]] == expected


def test_each_of_the_needles_has_a_name_of_its_own() -> None:
    example = Needles(length=700, num_needles=8).draw(random.Random(1), HAYSTACK, encode)
    text = TOKENIZER.decode(example.tokens)
    found = re.findall(r"^# The pass key of (\w+) is (\d{5})\.$", text, re.M)
    assert len({name for name, _ in found}) == len({number for _, number in found}) == 8
    assert {name for name, _ in found} <= set(NAMES)


def test_any_of_the_needles_may_be_the_one_that_is_asked() -> None:
    asked = set()
    for seed in range(40):
        text = TOKENIZER.decode(Needles(length=500, num_needles=3).draw(random.Random(seed), HAYSTACK, encode).tokens)
        names = re.findall(r"^# The pass key of (\w+) is", text, re.M)
        asked.add(names.index(re.findall(r"What is the pass key of (\w+)\?", text)[0]))
    assert asked == {0, 1, 2}


def test_a_text_without_line_breaks_has_its_line_at_the_end() -> None:
    haystack = encode("word " * 400)
    example = Passkey(length=100, depth=0.3).draw(random.Random(0), haystack, encode)
    assert answer_in(TOKENIZER.decode(example.tokens[: example.scored[0]]))
    assert re.fullmatch(LINE, TOKENIZER.decode(example.tokens).split("\n")[1])


def test_every_token_that_begins_with_a_line_break_is_known() -> None:
    written = {index: TOKENIZER.visible_token(index) or "" for index in range(2048)}
    known = {index for index, token in written.items() if token.startswith(("Ċ", "č"))}  # LF, CR
    assert line_breaks(encode) == known


def test_characters_as_tokens_are_spliced_alike() -> None:
    haystack = letters("one two\nthree\n\nfour five\nsix " * 20)
    for seed in range(50):
        example = Passkey(length=300).draw(random.Random(seed), haystack, letters, bos=0)
        text = "".join(chr(token) for token in example.tokens[1:])
        assert answer_in(text[:-6]) == text[-6:]
        assert len(set(example.distances)) == 1
        assert example.tokens[example.scored[0] - example.distances[0] :][:6] == example.tokens[-6:]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"kind": "associative_recall", "vocab_size": 8, "length": 40, "num_pairs": 4}, "vocab_size 8 .* 9 would"),
        ({"kind": "associative_recall", "vocab_size": 9, "length": 15, "num_pairs": 4}, "length 15 .* 16 would"),
        ({"kind": "induction", "vocab_size": 20, "length": 15, "span": 7}, "length 15 .* 16 would"),
        ({"kind": "induction", "vocab_size": 8, "length": 16}, "vocab_size 8 .* 9 would"),
        ({"kind": "needle", "vocab_size": 12, "length": 30, "num_distractors": 3}, "vocab_size 12 .* 13 would"),
        ({"kind": "needle", "vocab_size": 13, "length": 14, "num_distractors": 3}, "length 14 .* 15 would"),
    ],
)
def test_settings_that_cannot_be_say_what_would_be_enough(values: dict[str, Any], said: str) -> None:
    adapter: TypeAdapter[Any] = TypeAdapter(Task)
    with pytest.raises(ValidationError, match=said):
        adapter.validate_python(values)
    field = "vocab_size" if "vocab_size" in said else "length"
    enough = adapter.validate_python(values | {field: values[field] + 1})
    assert len(enough.draw(random.Random(0)).tokens) == enough.length


def test_a_text_task_too_short_or_without_enough_text_says_what_would_be_enough() -> None:
    with pytest.raises(ConfigError, match=r"passkey: length 20 is too short .* takes (\d+)") as caught:
        Passkey(length=20).draw(random.Random(0), HAYSTACK, encode)
    enough = int(str(caught.value).rsplit(" ", 1)[1])
    assert len(Passkey(length=enough).draw(random.Random(0), [], encode).tokens) == enough
    with pytest.raises(InputError, match=r"length 500 takes a haystack of (\d+) tokens, not 100"):
        Passkey(length=500).draw(random.Random(0), HAYSTACK[:100], encode)
    adapter: TypeAdapter[Any] = TypeAdapter(Task)
    with pytest.raises(ValidationError):
        adapter.validate_python({"kind": "needles", "num_needles": len(NAMES) + 1})


@pytest.mark.parametrize("task", [Passkey(), Needles(num_needles=len(NAMES))])
def test_the_most_that_a_text_task_takes_holds_every_example_and_not_one_token_less(task: Any) -> None:
    def draws(length: int) -> int:
        """How many of 100 examples fit."""
        sized, made = task.model_copy(update={"length": length}), 0
        for seed in range(100):
            with contextlib.suppress(ConfigError):
                made += len(sized.draw(random.Random(seed), HAYSTACK, encode).tokens) == length
        return made

    most = task.most_tokens(encode)
    assert draws(most) == 100
    assert draws(most - 1) < 100


@pytest.mark.parametrize("scored", [[], [0], [2, 2], [2, 1], [4]])
def test_an_example_scores_ascending_positions_that_something_stands_before(scored: list[int]) -> None:
    with pytest.raises(ValueError, match="scored"):
        Example([5, 6, 7, 8], scored, [1] * len(scored))


class Scripted:
    """A model that is right about every token but those in `wrong`, by the text's first token; it checks that it is
    told of no token twice, in order, and of none at or behind the last answer."""

    device = torch.device("cpu")

    def __init__(self, examples: list[Example], wrong: dict[int, set[int]]) -> None:
        self.truth = {example.tokens[0]: example.tokens for example in examples}
        self.wrong = wrong
        self.calls: list[tuple[int, int]] = []

    def make_cache(self, max_length: int) -> Cache:
        return Cache({}, max_length=max_length)

    def __call__(self, tokens: Tensor, cache: Cache, last_only: bool = False) -> Tensor:
        assert not torch.is_grad_enabled()
        if cache.lengths == [0]:
            self.first = int(tokens[0, 0])
        truth, wrong, start = self.truth[self.first], self.wrong.get(self.first, set()), cache.lengths[0]
        assert tokens[0].tolist() == truth[start : start + tokens.shape[1]]
        cache.end_step([tokens.shape[1]])
        places = range(start + 1, start + tokens.shape[1] + 1)
        chosen = torch.tensor([(truth[place] + (place in wrong)) % 50 for place in places])
        logits = torch.nn.functional.one_hot(chosen, 50).float()
        self.calls.append((tokens.shape[1], 1 if last_only else tokens.shape[1]))
        return logits[None, -1:] if last_only else logits[None]


EXAMPLES = [
    Example([1, 20, 21, 22, 23, 24, 25, 26, 27], scored=[4, 5, 7], distances=[2, 3, 6]),
    Example([2, 30, 31, 32, 33], scored=[4], distances=[3]),
    Example([3, 40, 41, 42], scored=[1, 2, 3], distances=[1, 1, 3]),
]


def test_accuracy_is_counted_by_distance() -> None:
    # Of the first example the tokens at 5 and 7 are wrong; so is the one at 6, which nobody asks for.
    model: Any = Scripted(EXAMPLES, {1: {5, 6, 7}, 3: {1}})
    assert accuracy_by_distance(model, EXAMPLES, [1, 2, 3, 6, 10, 11]) == {
        (1, 2): Accuracy(1, 2),
        (2, 3): Accuracy(1, 1),
        (3, 6): Accuracy(2, 3),
        (6, 10): Accuracy(0, 1),
        (10, 11): Accuracy(0, 0),
    }
    # The prompt for one row of logits, then the tokens between the first and the last answer.
    assert model.calls == [(4, 1), (3, 3), (4, 1), (1, 1), (2, 2)]


def test_an_example_is_solved_if_all_its_answers_are_right() -> None:
    assert solved(Scripted(EXAMPLES, {1: {6}, 3: {3}}), EXAMPLES) == [True, True, False]  # type: ignore[arg-type]


def test_share_is_that_of_the_right_ones_and_nan_of_none() -> None:
    assert Accuracy(3, 4).share == 0.75
    assert Accuracy(0, 0).share != Accuracy(0, 0).share


@pytest.mark.parametrize(
    ("edges", "said"), [([1], "at least two"), ([1, 3, 3, 9], "larger"), ([2, 9], "distance of 1"), ([0, 6], "of 6")]
)
def test_edges_that_leave_answers_out_are_refused(edges: list[int], said: str) -> None:
    with pytest.raises(InputError, match=said):
        accuracy_by_distance(Scripted(EXAMPLES, {}), EXAMPLES, edges)  # type: ignore[arg-type]


def test_examples_are_laid_end_to_end_for_training() -> None:
    inputs, targets, counts = batch_of(EXAMPLES[1:])
    assert inputs.tolist() == [[2, 30, 31, 32, 3, 40, 41]]
    assert targets.tolist() == [-100, -100, -100, 33, 40, 41, 42]
    assert counts == [4, 3]


def test_a_real_model_is_judged_as_by_one_forward_pass() -> None:
    from kvell import from_pretrained

    model = from_pretrained(bundled_model_path(), dtype=torch.float32)
    examples = [Passkey(length=200).draw(random.Random(seed), HAYSTACK, encode) for seed in range(4)]
    examples.append(Example(HAYSTACK[:60], list(range(20, 60)), [1] * 40))
    right = []
    for example in examples:
        with torch.no_grad():
            chosen = model(torch.tensor([example.tokens]))[0].argmax(-1).tolist()
        right.append([chosen[place - 1] == example.tokens[place] for place in example.scored])
    assert any(map(any, right))
    assert not all(map(all, right))
    assert solved(model, examples) == [all(each) for each in right]
    total = sum(map(sum, right))
    assert accuracy_by_distance(model, examples, [0, 1000]) == {(0, 1000): Accuracy(total, sum(map(len, right)))}
