"""What a model is given wrong, it refuses in one line; what it can only guess at, it warns of."""

import warnings
from typing import Any

import pytest
import torch
from strategies import random_model
from test_cache import small_config

import kvell
from kvell import InputError

MODEL = random_model(small_config(7, None))


@pytest.mark.parametrize(
    ("tokens", "counts", "message"),
    [
        (torch.tensor([[1, 31]]), None, "token id 31 is outside the vocabulary of 31"),
        (torch.tensor([[1, -2]]), None, "token id -2 is outside the vocabulary of 31"),
        (torch.tensor([1, 2]), None, r"tokens must be \(batch, tokens\)"),
        (torch.zeros(1, 0, dtype=torch.long), None, "at least one of each"),
        (torch.zeros(1, 3), None, "int64 or int32, not torch.float32"),
        (torch.zeros(1, 3, dtype=torch.long), [1, 1], r"counts \[1, 1\] do not lay out tokens"),
        (torch.zeros(1, 3, dtype=torch.long), [3, 0], r"counts \[3, 0\] do not lay out tokens"),
        (torch.zeros(2, 3, dtype=torch.long), [3, 3], r"counts \[3, 3\] do not lay out tokens"),
        (torch.zeros(1, 3, dtype=torch.long), 3, "counts must be whole numbers, one for each sequence, not 3"),
        (torch.zeros(1, 3, dtype=torch.long), [1.5, 1.5], r"counts must be whole numbers.*, not \[1.5, 1.5\]"),
    ],
)
def test_tokens_that_cannot_be_are_refused_and_leave_the_cache_as_it_was(
    tokens: Any, counts: Any, message: str
) -> None:
    cache = MODEL.make_cache(batch_size=len(counts) if isinstance(counts, list) else 1)
    with pytest.raises(InputError, match=message):
        MODEL(tokens, cache=cache, counts=counts)
    assert set(cache.lengths) == {0}
    cache.check_whole()


def test_a_sequence_that_outgrows_the_positions_is_warned_of_once() -> None:
    model = random_model(small_config(7).model_copy(update={"max_positions": 8}))
    cache = model.make_cache()
    model(torch.zeros(1, 8, dtype=torch.long), cache=cache)
    with pytest.warns(UserWarning, match="9 tokens, and the model has 8 positions") as warned:
        model(torch.zeros(1, 1, dtype=torch.long), cache=cache)
    assert [warning.filename for warning in warned] == [__file__], "the line that asked for it is named"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(torch.zeros(1, 1, dtype=torch.long), cache=cache)
    with pytest.warns(UserWarning, match="9 tokens"):
        model(torch.zeros(1, 9, dtype=torch.long))


@pytest.mark.parametrize("length", [5, 9, 12])
def test_a_text_that_outgrows_the_positions_is_warned_of_once(length: int) -> None:
    """Whether the prompt does or what is generated."""
    model = random_model(small_config(7).model_copy(update={"max_positions": 8}))
    cache = model.make_cache()
    with pytest.warns(UserWarning, match=f"the text may reach {length + 4} tokens") as warned:
        assert len(list(kvell.generate(model, [1] * length, 4, cache=cache))) == 4
    assert [warning.filename for warning in warned] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        list(kvell.generate(model, [1], 4, cache=cache))


def test_a_warning_made_an_error_leaves_the_cache_usable() -> None:
    model = random_model(small_config(7).model_copy(update={"max_positions": 8}))
    cache = model.make_cache()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning):
            model(torch.zeros(1, 9, dtype=torch.long), cache=cache)
    assert model(torch.zeros(1, 2, dtype=torch.long), cache=cache).shape == (1, 2, 31)
