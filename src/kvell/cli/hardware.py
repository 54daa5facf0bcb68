"""Options that say how a model is run."""

from kvell.errors import InputError


def set_threads(threads: int | None) -> None:
    """Limits the threads torch computes with; None leaves the choice to torch."""
    import torch

    if threads is None:
        return
    if threads < 1:
        raise InputError(f"threads {threads} is less than 1")
    torch.set_num_threads(threads)
