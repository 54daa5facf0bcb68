"""What keeps fp32 does so under torch.autocast too.

In training with `precision: bfloat16` autocast rounds the operands of every product to bf16, fp32 tensors included.
Which expert is chosen, which entry is picked and how streams are mixed is too delicate for that, so what computes it
runs outside of autocast.
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

    Its first tensor tells the device. Under autocast the dtypes of its arguments may differ from each other where
    they never do without: the function itself has to bring them together.
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
