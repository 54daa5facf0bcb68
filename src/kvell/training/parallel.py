"""One process or many: who trains which micro-batches, and where the weights lie.

Started by torchrun, every process holds its shard of each layer (FSDP2, `fully_shard`) and gathers a layer's weights
when it runs. A layer that reads another's keys and values gets this step's tensors as ever: what is sharded are
weights, not the step. Processes divide a step's micro-batches among them, so a run is the same on any number.
"""

import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from kvell.errors import InputError, KvellError
from kvell.model import Decoder

Name = TypeVar("Name", str, int)


@dataclass(frozen=True)
class Processes:
    """This process among all that train together."""

    rank: int
    count: int
    device: torch.device
    mesh: DeviceMesh | None

    @classmethod
    def of(cls, device: torch.device) -> "Processes":
        """As torchrun's environment says; alone without one."""
        if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
            return cls(0, 1, device, None)
        if device.type != "cpu":
            device = torch.device(device.type, int(os.environ.get("LOCAL_RANK", "0")))
            torch.accelerator.set_device_index(device.index)
        if not dist.is_initialized():
            dist.init_process_group("gloo" if device.type == "cpu" else None)
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        return cls(dist.get_rank(), dist.get_world_size(), device, mesh)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def shard(self, model: Decoder) -> None:
        """Divides the weights over the processes, layer by layer; nothing to do for one that is alone.

        What is not learnt by gradients, routers' selection biases, stays whole everywhere.
        """
        if self.mesh is None:
            return
        whole = {parameter for parameter in model.parameters() if not parameter.requires_grad}
        # FSDP warns of views that are then changed in place, which nothing here does.
        warnings.filterwarnings("ignore", r"FSDP2-wrapped module .* returned a view tensor")
        # Hooks run in their order: these come before FSDP's own, which take the gathered weights away.
        for layer in model.layers:
            layer.register_forward_hook(lambda layer, _, made: reached(made, layer.parameters()))
            fully_shard(layer, mesh=self.mesh, ignored_params=whole)
        model.register_forward_hook(lambda model, _, made: reached(made, outside_layers(model)))
        fully_shard(model, mesh=self.mesh, ignored_params=whole)
        register_fsdp_forward_method(model, "draft")

    def mine(self, micro_batches: Sequence[Any]) -> Sequence[Any]:
        """This process's share of a step."""
        if len(micro_batches) % self.count:
            raise InputError(
                f"stages: {len(micro_batches)} micro_batches cannot be divided over {self.count} processes: "
                f"use a multiple of {self.count}"
            )
        return micro_batches[self.rank :: self.count]

    def total(self, values: Tensor) -> Tensor:
        """The sum over all processes."""
        if self.mesh is not None:
            dist.all_reduce(values)
        return values

    def totals(self, values: Mapping[Name, Tensor]) -> dict[Name, Tensor]:
        """The sums over all processes, name by name: a process that lacks a name adds nothing to it."""
        if self.mesh is None:
            return dict(values)
        gathered: list[dict[Name, Tensor]] = [{} for _ in range(self.count)]
        dist.all_gather_object(gathered, {name: value.cpu() for name, value in values.items()})
        sums: dict[Name, Tensor] = {}
        for each in gathered:
            for name, value in each.items():
                sums[name] = sums[name] + value if name in sums else value
        return {name: value.to(self.device) for name, value in sums.items()}

    def any(self, here: bool) -> bool:
        """Whether it is so on any process: what all of them are then to act on, in the same step."""
        return bool(self.total(torch.tensor(float(here), device=self.device)))

    def told_by_first(self, problem: KvellError | None) -> KvellError | None:
        """What the first process finds wrong, on every process."""
        told = [problem]
        if self.mesh is not None:
            dist.broadcast_object_list(told, src=0, device=self.device)
        return told[0]

    def told_by_any(self, problem: str | None) -> str | None:
        """What some process finds wrong, on every process; it waits for all of them to have looked."""
        told = [problem] * self.count
        if self.mesh is not None:
            dist.all_gather_object(told, problem)
        return next((each for each in told if each is not None), None)

    def wait(self) -> None:
        """Until every process has come this far."""
        if self.mesh is not None:
            dist.barrier()

    def leave(self) -> None:
        """Ends working together; each goes on alone."""
        if dist.is_initialized():
            dist.destroy_process_group()


def is_first_to_say(message: str) -> bool:
    """Whether no other of torchrun's processes has said this before: what is wrong is mostly so for all of them.

    The store that torchrun keeps for its processes counts; they need not be working together yet, or any more.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return True
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    try:
        store = dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=10))  # type: ignore[attr-defined]
        return bool(store.add(f"kvell said in attempt {attempt}: {message}", 1) == 1)
    except RuntimeError:  # the store is gone, and rather said twice than not at all
        return True


def outside_layers(model: nn.Module) -> Iterator[nn.Parameter]:
    return (parameter for name, parameter in model.named_parameters() if not name.startswith("layers."))


def reached(made: Any, parameters: Iterable[nn.Parameter]) -> Any:
    """What a module made, unchanged, with every parameter taking part in it.

    FSDP2 sums the gradients of a unit in one piece, and every process must have the same ones; but a piece of text
    shorter than a compressor's ratio completes no entry, and leaves that compressor's parameters without a gradient.
    """
    if not torch.is_grad_enabled():
        return made
    nothing = sum(0 * parameter.sum() for parameter in parameters if parameter.requires_grad)
    return (made[0] + nothing, *made[1:]) if isinstance(made, tuple) else made + nothing


def whole(tensor: Tensor) -> Tensor:
    """A tensor's value on every process, wherever its shards lie."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def clip(parameters: Sequence[nn.Parameter], limit: float | None) -> Tensor:
    """The norm of all gradients together, which are scaled down to `limit` where it is more."""
    norm = nn.utils.clip_grad_norm_(parameters, float("inf") if limit is None else limit)
    return whole(norm)
