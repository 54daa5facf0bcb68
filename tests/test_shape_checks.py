"""The checks of shapes that hold in all tests: they reach every module of kvell that states one."""

import importlib

import pytest
import torch
from jaxtyping import TypeCheckError
from shape_checks import modules_with_shapes

from kvell.generation.sampling import Sampler, SamplingSettings
from kvell.training.losses import StepLoss


@pytest.mark.parametrize("name", modules_with_shapes())
def test_every_module_that_states_shapes_is_loaded_with_checks(name: str) -> None:
    module = importlib.import_module(name)
    assert type(module.__loader__).__module__.startswith("jaxtyping")


def test_no_package_escapes() -> None:
    packages = {name.split(".")[1] for name in modules_with_shapes()}
    assert packages >= {"decoding", "generation", "kernels", "layers", "training", "model", "step"}


def test_a_wrong_shape_is_refused_wherever_it_is() -> None:
    with pytest.raises(TypeCheckError):
        StepLoss(torch.zeros(3))
    sampler = Sampler(SamplingSettings())
    with pytest.raises(TypeCheckError):
        sampler(torch.zeros(2, 3))
