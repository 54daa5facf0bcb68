"""The inverse frequencies of a rotary embedding are computed once, and serve whoever asks next."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from kvell.layers import rotary as module
from kvell.layers.rotary import DefaultRotary, rotary_table

ROTARY = DefaultRotary(theta=100.0)


@pytest.fixture(autouse=True)
def _nothing_known() -> Iterator[None]:
    module._inverse_frequencies.cache_clear()
    yield
    module._inverse_frequencies.cache_clear()


def table(at: Tensor) -> Tensor:
    return torch.cat(rotary_table(ROTARY, 8, at, torch.float32))


def expected(at: Tensor) -> Tensor:
    angles = at[:, None] * 100.0 ** -(torch.arange(0, 8, 2) / 8)
    return torch.cat([angles.cos(), angles.sin()])


def test_equal_embeddings_share_one_computation(monkeypatch: pytest.MonkeyPatch) -> None:
    computed = []
    run = DefaultRotary.inverse_frequencies

    def noted(self: DefaultRotary, head_dim: int) -> Tensor:
        computed.append((self.theta, head_dim))
        return run(self, head_dim)

    monkeypatch.setattr(DefaultRotary, "inverse_frequencies", noted)
    for theta, head_dim in ((100.0, 8), (100.0, 8), (50.0, 8), (100.0, 4), (100.0, 8)):
        rotary_table(DefaultRotary(theta=theta), head_dim, torch.arange(3), torch.float32)
    assert computed == [(100.0, 8), (50.0, 8), (100.0, 4)]


def test_what_inference_asked_for_first_is_no_tensor_of_inference() -> None:
    """Which training could not keep for its gradients."""
    with torch.inference_mode():
        table(torch.arange(3))
        known = module._inverse_frequencies(ROTARY, 8, torch.device("cpu"))
    assert not known.is_inference()


def test_fake_tensors_neither_meet_the_known_ones_nor_stay() -> None:
    at = torch.arange(3)
    for _ in range(2):
        with FakeTensorMode():
            assert isinstance(table(torch.arange(3)), FakeTensor)
        torch.testing.assert_close(table(at), expected(at))
    with torch.device("meta"):
        module._inverse_frequencies.cache_clear()
        table(at)
    torch.testing.assert_close(table(at), expected(at))


class Turning(nn.Module):
    def forward(self, at: Tensor) -> Tensor:
        return table(at)


@pytest.mark.parametrize("known_before", [False, True])
def test_an_exported_table_is_the_same_and_leaves_nothing_behind(known_before: bool) -> None:
    at = torch.arange(5)
    if known_before:
        table(at)
    exported = torch.export.export(Turning(), (at,), strict=False)
    torch.testing.assert_close(exported.module()(at), expected(at))
    torch.testing.assert_close(table(at), expected(at))
