"""The choice of a token from logits."""

import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvell.errors import InputError, KvellError
from kvell.generation.sampling import Sampler, SamplingSettings, keep_min_p, keep_top_k, keep_top_p


def logits_of(*probabilities: float) -> torch.Tensor:
    return torch.tensor(probabilities, dtype=torch.float64).log()


def drawn(logits: torch.Tensor, draws: int = 2000, **values: float) -> Counter[int]:
    sampler = Sampler(SamplingSettings(**{"temperature": 1.0, **values}))
    return Counter(sampler(logits) for _ in range(draws))


def test_temperature_zero_takes_the_most_probable_token() -> None:
    assert Sampler(SamplingSettings())(torch.tensor([0.5, 3.0, 2.9])) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_temperature_zero_takes_the_lowest_id_of_equal_ones(dtype: torch.dtype) -> None:
    logits = torch.zeros(5000, dtype=dtype)
    logits[[77, 3000, 4999]] = 1
    assert Sampler(SamplingSettings())(logits) == 77


def test_draws_follow_the_probabilities() -> None:
    counts = drawn(logits_of(0.5, 0.3, 0.2), draws=10000)
    assert [counts[token] / 10000 for token in range(3)] == pytest.approx([0.5, 0.3, 0.2], abs=0.02)


def test_temperature_sharpens_and_flattens() -> None:
    counts = drawn(logits_of(0.8, 0.2), draws=10000, temperature=0.5)
    assert counts[0] / 10000 == pytest.approx(0.64 / 0.68, abs=0.02)
    counts = drawn(logits_of(0.8, 0.2), draws=10000, temperature=2.0)
    assert counts[0] / 10000 == pytest.approx(2 / 3, abs=0.02)


def test_a_tiny_temperature_is_nearly_greedy_and_does_not_overflow() -> None:
    assert set(drawn(torch.tensor([50.0, 60.0, 59.0]), draws=20, temperature=1e-300)) == {1}


def test_top_k_keeps_the_k_best_and_the_lowest_of_equal_ones() -> None:
    assert keep_top_k(torch.tensor([1.0, 3.0, 2.0, 3.0, 2.0, 2.0]), 3).tolist() == [1, 3, 2]
    assert set(drawn(torch.zeros(100), top_k=2)) == {0, 1}


def test_top_k_of_more_than_the_vocabulary_keeps_all() -> None:
    assert set(drawn(torch.zeros(3), top_k=10)) == {0, 1, 2}


def test_top_p_keeps_the_token_that_passes_p() -> None:
    scores = logits_of(0.5, 0.3, 0.2)
    assert keep_top_p(scores, 0.6).tolist() == [0, 1]
    assert keep_top_p(scores, 0.45).tolist() == [0]
    assert keep_top_p(scores, 0.9).tolist() == [0, 1, 2]
    assert keep_top_p(logits_of(0.25, 0.5, 0.25), 0.5).tolist() == [1], "p reached exactly needs no more"
    assert keep_top_p(logits_of(0.25, 0.25, 0.5), 0.6).tolist() == [2, 0], "the lowest of equal ones comes first"


def test_min_p_is_relative_to_the_best() -> None:
    assert keep_min_p(logits_of(0.5, 0.3, 0.2), 0.5).tolist() == [0, 1]
    assert keep_min_p(logits_of(0.4, 0.4, 0.2), 1.0).tolist() == [0, 1]
    assert set(drawn(logits_of(0.5, 0.3, 0.2), min_p=0.0)) == {0, 1, 2}


def test_temperature_comes_before_top_p_and_top_k_before_it() -> None:
    # At temperature 1 the first token alone reaches 0.6; flattened to 0.46, 0.32, 0.22 two are needed.
    logits = logits_of(0.6, 0.3, 0.1)
    assert set(drawn(logits, top_p=0.6)) == {0}
    assert set(drawn(logits, top_p=0.6, temperature=2.0)) == {0, 1}
    # Of three tokens top_p 0.7 keeps two; of the two best, renormalised to 0.71 and 0.29, it keeps one.
    logits = logits_of(0.5, 0.2, 0.3)
    assert set(drawn(logits, top_p=0.7)) <= {0, 2}
    assert set(drawn(logits_of(0.6, 0.25, 0.15), top_p=0.7, top_k=2)) == {0}
    assert set(drawn(logits_of(0.6, 0.25, 0.15), top_p=0.7)) == {0, 1}


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    size=st.integers(2, 200),
    temperature=st.floats(0.1, 3),
    top_k=st.none() | st.integers(1, 250),
    top_p=st.none() | st.floats(0.05, 1),
    min_p=st.none() | st.floats(0, 1),
)
def test_the_tokens_kept_are_those_that_transformers_keeps(
    seed: int, size: int, temperature: float, top_k: int | None, top_p: float | None, min_p: float | None
) -> None:
    processors = pytest.importorskip("transformers.generation.logits_process")
    logits = torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 3
    expected = processors.TemperatureLogitsWarper(temperature)(None, logits[None].clone())
    if top_k is not None:
        expected = processors.TopKLogitsWarper(top_k)(None, expected)
    if top_p is not None:
        expected = processors.TopPLogitsWarper(top_p)(None, expected)
    if min_p is not None:
        expected = processors.MinPLogitsWarper(min_p)(None, expected)
    sampler = Sampler(SamplingSettings(temperature, top_k, top_p, min_p))
    scores, kept = sampler._filter((logits - logits.max()) / temperature)
    actual = torch.zeros(size, dtype=torch.float64)
    actual[kept] = scores.softmax(-1)
    torch.testing.assert_close(actual, expected[0].softmax(-1))


def test_equal_seeds_draw_equal_tokens_and_others_do_not() -> None:
    logits = torch.zeros(1000)

    def tokens(seed: int) -> list[int]:
        sampler = Sampler(SamplingSettings(temperature=1.0, seed=seed))
        return [sampler(logits) for _ in range(20)]

    assert tokens(7) == tokens(7)
    assert tokens(7) != tokens(8)


def test_a_sampler_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    drawn(torch.zeros(10), draws=5)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_are_an_error(value: float, temperature: float) -> None:
    with pytest.raises(KvellError, match="highest logit is"):
        Sampler(SamplingSettings(temperature=temperature))(torch.tensor([0.0, value, 1.0]))


def test_a_token_masked_with_minus_infinity_is_never_drawn() -> None:
    assert set(drawn(torch.tensor([0.0, -math.inf, 0.0]), top_p=0.99)) == {0, 2}


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_k": 0},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_p": math.nan},
        {"min_p": -0.1},
        {"min_p": 1.1},
        {"seed": -1},
        {"seed": 2**64},
    ],
    ids=str,
)
def test_a_setting_outside_its_range_is_named(values: dict[str, float]) -> None:
    (name, value), *_ = values.items()
    with pytest.raises(InputError, match=f"^{name} .*{value}"):
        SamplingSettings(**values)  # type: ignore[arg-type]
