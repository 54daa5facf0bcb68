"""Computations that stay in fp32 under torch.autocast.

In training with `precision: bfloat16` autocast rounds the operands of every product to bf16, fp32 tensors included.
The choice of experts, the choice of entries and the mixing of hyper-connections' lanes do not bear that rounding, so
they run outside of autocast.
"""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def outside_autocast(run: Callable[P, R]) -> Callable[P, R]:
    """A function or method that computes in the dtypes of its arguments, whatever autocast says.

    The device is that of its first tensor. Under autocast its arguments may come in several dtypes, which they never
    do otherwise: the function itself has to convert them.
    """

    @wraps(run)
    def shielded(*args: P.args, **kwargs: P.kwargs) -> R:
        device = device_of(*args)
        if device == "meta" or not torch.is_autocast_enabled(device):
            return run(*args, **kwargs)
        with torch.autocast(device, enabled=False):
            return run(*args, **kwargs)

    return shielded


def device_of(*args: object) -> str:
    for value in args:
        if isinstance(value, Tensor):
            return value.device.type
    raise TypeError("none of the positional arguments is a tensor")
