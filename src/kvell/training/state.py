"""What a run needs besides its config to go on: the tensors of model and optimizers, and the random state.

    state-00000-of-00002.safetensors        what the first of two processes holds

Every process writes the rows that it holds of each sharded tensor; the first one also writes what is whole
everywhere. The file's metadata says, for a tensor that is sharded, the place of its first row and how many rows all
pieces have together, so any number of processes can read what another number wrote. Nothing but tensors and JSON is
written or read: reading a run's folder never executes code from it. Learning rates and whatever else an optimizer's
groups hold follow from the config and the step, and are not stored.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import NonNegativeInt, PositiveInt, TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor, Shard
from torch.optim import Optimizer

from kvell.errors import CheckpointError
from kvell.files import DTYPE_NAMES, save_to
from kvell.model import Decoder

ROWS, RANDOM = "rows", "random_state"
# Of a tensor that several files share: the first of the rows that a file has, and how many there are in all.
DIVIDED = TypeAdapter(dict[str, tuple[NonNegativeInt, PositiveInt]])


@dataclass(frozen=True)
class Piece:
    """Rows of a tensor that lie together: `values` (R, ...) are those from row `first` on, of `rows` in all."""

    values: Tensor
    first: int
    rows: int

    @classmethod
    def held(cls, tensor: Tensor) -> "Piece | None":
        """What this process holds of a sharded tensor; None for a tensor that is whole."""
        if not isinstance(tensor, DTensor):
            return None
        if tuple(tensor.placements) != (Shard(0),):
            raise ValueError(
                f"a tensor is divided by {tensor.placements}, and not by rows over one line of processes"
            )
        rows, mesh = tensor.shape[0], tensor.device_mesh
        most = -(-rows // mesh.size())  # as torch.chunk divides them: all but the last have this many
        return cls(tensor.to_local(), min(mesh.get_local_rank() * most, rows), rows)


def save_state(folder: Path, model: Decoder, optimizers: list[Optimizer], rank: int, count: int) -> None:
    """Writes this process's file. OSError where that fails."""
    held: dict[str, Tensor] = {}
    rows: dict[str, list[int]] = {}
    for name, tensor in _tensors(*_states(model, optimizers)).items():
        piece = Piece.held(tensor)
        if piece is not None and len(piece.values):
            held[name], rows[name] = piece.values, [piece.first, piece.rows]
        elif piece is None and rank == 0:
            held[name] = tensor
    save_to(folder / f"state-{rank:05d}-of-{count:05d}.safetensors", held, {ROWS: json.dumps(rows)})


def load_state(folder: Path, model: Decoder, optimizers: list[Optimizer]) -> None:
    """Puts model, optimizers and the random state where the files of a folder say.

    CheckpointError, before anything is changed, for files that are missing, damaged, or of another model.
    """
    of_model, of_optimizers = _states(model, optimizers)
    tensors = _tensors(of_model, of_optimizers)
    try:
        stored = Stored(folder)
        stored.check(tensors)
        for name, tensor in tensors.items():
            piece = Piece.held(tensor)
            local = tensor if piece is None else piece.values
            local.copy_(stored.read(name, local, 0 if piece is None else piece.first))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{folder} cannot be read: {error}") from None
    try:
        torch.set_rng_state(tensors[RANDOM])
    except RuntimeError as error:
        raise CheckpointError(f"{folder} cannot be read: {RANDOM}: {error}") from None
    set_model_state_dict(model, of_model)
    set_optimizer_state_dict(model, optimizers, of_optimizers)


@dataclass(frozen=True)
class Place:
    """Where rows of a tensor are stored: from row `first` on, of `rows` in all, in a file's slice."""

    first: int
    rows: int
    stored: Any

    @property
    def shape(self) -> list[int]:
        """That of the piece."""
        return list(self.stored.get_shape())

    @property
    def end(self) -> int:
        """The first row that is not in the piece any more; a tensor without dimensions counts as one row."""
        return self.first + (self.shape[0] if self.shape else 1)


class Stored:
    """The tensors in a folder's files, each in one piece or several."""

    def __init__(self, folder: Path) -> None:
        paths = sorted(folder.glob("state-*-of-*.safetensors"))
        if not paths and (folder / ".metadata").exists():
            raise CheckpointError(
                f"{folder} was written by an earlier Kvell in Python's pickle format, which can hold code and is not "
                "read: end that run with the Kvell that began it, or discard it with --fresh"
            )
        if not paths:
            raise CheckpointError(f"{folder} holds no state-*-of-*.safetensors")
        self._folder = folder
        self._places: dict[str, list[Place]] = {}
        for path in paths:
            file: Any = safe_open(path, "pt")
            try:
                divided = DIVIDED.validate_json((file.metadata() or {}).get(ROWS, "{}"))
            except ValidationError as error:
                raise CheckpointError(f"{path} is damaged: {ROWS}: {error.errors()[0]['msg']}") from None
            for name in file.keys():  # noqa: SIM118
                stored = file.get_slice(name)
                shape = stored.get_shape()
                first, rows = divided.get(name, (0, shape[0] if shape else 1))
                self._places.setdefault(name, []).append(Place(first, rows, stored))
        for places in self._places.values():
            places.sort(key=lambda place: place.first)

    def check(self, wanted: Mapping[str, Tensor]) -> None:
        """CheckpointError unless the files hold these tensors whole, in their shapes and dtypes, and no others."""
        for names, what in (
            (wanted.keys() - self._places.keys(), "is missing"),
            (self._places.keys() - wanted.keys(), "is not known to this run"),
        ):
            if names:
                raise CheckpointError(f"{self._folder}: {min(names)} {what}")
        for name, tensor in wanted.items():
            covered = 0
            for place in self._places[name]:
                shape = [place.rows, *place.shape[1:]] if place.shape else []
                if shape != list(tensor.shape) or place.stored.get_dtype() != DTYPE_NAMES[tensor.dtype]:
                    raise CheckpointError(
                        f"{self._folder}: {name} is {place.stored.get_dtype()} of the shape {shape}, and in this run "
                        f"{DTYPE_NAMES[tensor.dtype]} of the shape {list(tensor.shape)}"
                    )
                if place.first != covered:
                    break
                covered = place.end
            if covered != (tensor.shape[0] if tensor.ndim else 1):
                raise CheckpointError(f"{self._folder}: a file is missing, row {covered} of {name} is in none")

    def read(self, name: str, like: Tensor, first: int) -> Tensor:
        """The rows from `first` on, as many as `like` (R, ...) has; all of a tensor without dimensions."""
        if not like.ndim:
            value: Tensor = self._places[name][0].stored[...]
            return value
        pieces = [like[:0].cpu()]
        for place in self._places[name]:
            low, high = max(first, place.first), min(first + len(like), place.end)
            if low < high:
                pieces.append(place.stored[low - place.first : high - place.first])
        return torch.cat(pieces)


def _states(model: Decoder, optimizers: list[Optimizer]) -> tuple[dict[str, Any], dict[str, Any]]:
    return get_model_state_dict(model), dict(get_optimizer_state_dict(model, optimizers))


def _tensors(of_model: Mapping[str, Any], of_optimizers: Mapping[str, Any]) -> dict[str, Tensor]:
    """All tensors of a state by one name each, the random state among them."""
    named = {RANDOM: torch.get_rng_state()}
    named |= {f"model.{name}": tensor for name, tensor in of_model.items()}
    for parameter, values in of_optimizers["state"].items():
        named |= {f"optimizer.{parameter}.{key}": value for key, value in values.items()}
    return named
