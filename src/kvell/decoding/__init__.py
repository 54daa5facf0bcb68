"""Steps of one token per sequence, without the cost of running them operator by operator: compiled to machine code
on the CPU, recorded as CUDA graphs on a CUDA device. Both leave out the layers' operations on the cache
(cache_operation.py), which run as they are.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from kvell.decoding.one_token import Weights
from kvell.errors import InputError
from kvell.hardware import check_compiler, user_code_folder
from kvell.step import Step

if TYPE_CHECKING:
    from kvell.model import Decoder


class DecodingStep(Protocol):
    """What runs in place of a model's own forward, for as long as the weights lie where they are."""

    weights: Weights
    folder: Path | None  # where code that was compiled is kept

    def __call__(self, step: Step) -> Tensor:
        """Logits (B, V) of a step of one token for each of B sequences."""
        ...


def decoding_step(model: "Decoder", batch_size: int, folder: str | Path | None) -> DecodingStep:
    """A model's step of one token for each of `batch_size` sequences. InputError where there can be none."""
    check_device(model.device)
    if model.device.type == "cuda":
        if folder is not None:
            raise InputError("nothing is kept in a folder on a CUDA device: decoding is recorded there, in a moment")
        from kvell.decoding.recorded import RecordedStep

        return RecordedStep(model, batch_size)
    from kvell.decoding.compiled import CompiledStep

    return CompiledStep(model, batch_size, user_code_folder() if folder is None else Path(folder).absolute())


def check_device(device: torch.device) -> None:
    """InputError where decoding can be neither compiled nor recorded."""
    if device.type == "cpu":
        check_compiler(device, "decode without compiling")
    elif device.type != "cuda":
        raise InputError(f"decoding is compiled for the CPU and recorded on CUDA devices, not on {device}")
