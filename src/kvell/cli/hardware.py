"""Options that say how a model is run: its dtype, its device, its threads."""

from typing import TYPE_CHECKING

from kvell.errors import InputError

if TYPE_CHECKING:
    import torch

DTYPES = ("bfloat16", "float32", "float16")


def parse_dtype(name: str | None) -> "torch.dtype | None":
    """The dtype called `name`, None for the one the weights are stored in."""
    import torch

    if name is None:
        return None
    if name not in DTYPES:
        raise InputError(f"dtype {name} is unknown: use one of {', '.join(DTYPES)}")
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def parse_device(name: str) -> "torch.device":
    """The device called `name`, which must be one that this machine has."""
    import torch

    available = ["cpu"]
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None:
        kind = accelerator.type
        available += [kind, *(f"{kind}:{index}" for index in range(torch.accelerator.device_count()))]
    if name not in available:
        raise InputError(f"device {name} is not to be had here: use one of {', '.join(available)}")
    return torch.device(name)


def set_threads(threads: int | None) -> None:
    """Limits the threads torch computes with; None leaves the choice to torch."""
    import torch

    if threads is None:
        return
    if threads < 1:
        raise InputError(f"threads {threads} is less than 1")
    torch.set_num_threads(threads)
