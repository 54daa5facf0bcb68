"""Metrics to where people look at them, where that is installed."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from kvell.errors import InputError


class Tracker(Protocol):
    def log(self, values: dict[str, float], step: int) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"))

    def log(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class Trackio:
    def __init__(self, folder: Path) -> None:
        import trackio

        self._trackio: Any = trackio
        trackio.init(project="kvell", name=folder.name)

    def log(self, values: dict[str, float], step: int) -> None:
        self._trackio.log(values, step=step)

    def close(self) -> None:
        self._trackio.finish()


KINDS: dict[str, type[TensorBoard] | type[Trackio]] = {"tensorboard": TensorBoard, "trackio": Trackio}


def open_trackers(names: tuple[str, ...], folder: Path) -> list[Tracker]:
    """InputError for one that is not installed."""
    for name in names:
        if find_spec(name) is None:
            raise InputError(f"trackers: {name} is not installed: `pip install {name}`, or leave it out")
    return [KINDS[name](folder) for name in names]
