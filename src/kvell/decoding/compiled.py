"""The step of one token per sequence, compiled as a whole, for the CPU.

Decoding a small model is bound by what surrounds each operator, not by the numbers that it reads. The step is traced
once, by running it on tensors without values, and compiled by torch's AOTInductor to machine code that is called
without Python:

    tokens, positions, rows -> embed -> layers -> norm -> head -> logits
                                          |
                                          |-> operations on the cache that work in place find rows by the table
                                          `-> other operations on the cache are called back, as they are

Around the cache all shapes are known: one row per sequence. Caches stay what they are: attention over keys and values
is told where their streams have their rows, and what else grows with the past, compressed entries, is Python as
without compiling. The weights are the model's own: the machine code is told where they lie.

Compiled code is kept in `folder` under a digest of everything it depends on: the traced step, torch, the processor
and the number of threads. Tracing takes seconds, compiling a quarter of a minute for ten small layers.
"""

import hashlib
import tempfile
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from kvell.cache_operation import CacheOperation, InPlace
from kvell.decoding.one_token import OneTokenStep, Weights
from kvell.decoding.row_table import empty_table, row_table
from kvell.errors import InputError
from kvell.hardware import keeping_code_in, processor
from kvell.kernels import use
from kvell.layers.contract import AttentionModule
from kvell.private_files import is_kept, keep
from kvell.step import Step

if TYPE_CHECKING:
    from kvell.model import Decoder

_library = torch.library.Library("kvell", "FRAGMENT")
_library.define("cache_operation(Tensor?[] inputs, int number, SymInt[] shape) -> Tensor")
# The step that runs on this thread, and the operations that the compiled code calls back.
_running = threading.local()


def _call_back(inputs: Sequence[Tensor | None], number: int, shape: Sequence[int]) -> Tensor:
    step: Step = _running.step
    try:
        made: Tensor = _running.operations[number](step, step, *inputs)
        assert inputs[0] is not None
        return made.to(inputs[0].dtype).contiguous()  # which it need not have under autocast
    except BaseException as error:
        _running.error = error
        raise


def _shaped(inputs: Sequence[Tensor | None], number: int, shape: Sequence[int]) -> Tensor:
    assert inputs[0] is not None
    return inputs[0].new_empty(shape)


_library.impl("cache_operation", _call_back, "CPU")
torch.library.register_fake("kvell::cache_operation", _shaped, lib=_library)


class _LeftOut(NamedTuple):
    """What a compiled step leaves out, in its order: what is called back, and what works in place."""

    called_back: list[CacheOperation]
    in_place: list[InPlace]


class _TracedStep(OneTokenStep):
    """A step without values, that notes what it leaves out."""

    def __init__(self, model: "Decoder", tokens: Tensor, positions: Tensor, rows: Tensor) -> None:
        super().__init__(model, tokens, positions)
        self.rows, self.dtype = rows, model.dtype
        self.left_out = _LeftOut([], [])

    def leave_out(self, operation: CacheOperation, inputs: tuple[Tensor | None, ...]) -> Tensor:
        called_back, in_place = self.left_out
        form = operation.in_place(self.dtype, *inputs)
        if form is not None:
            in_place.append(form)
            return form.run(self.rows[len(in_place) - 1], *inputs)
        called_back.append(operation)
        shape = list(operation.result_shape(self, *inputs))
        result: Tensor = torch.ops.kvell.cache_operation(list(inputs), len(called_back) - 1, shape)
        return result


class _OneToken(nn.Module):
    """What is traced."""

    def __init__(self, model: "Decoder", keep: Callable[[_LeftOut], None]) -> None:
        super().__init__()
        # Tracing forgets what it changes of a module: what is left out is kept elsewhere.
        self.model, self.keep = model, keep

    def forward(self, tokens: Tensor, positions: Tensor, rows: Tensor) -> Tensor:
        step = _TracedStep(self.model, tokens, positions, rows)
        logits = self.model.logits_of(step)
        self.keep(step.left_out)
        return logits


class CompiledStep:
    """A model's step of one token for each of `batch_size` sequences. One step runs at a time: threads take turns."""

    def __init__(self, model: "Decoder", batch_size: int, folder: Path) -> None:
        """InputError where nothing can be compiled."""
        self.lock = threading.Lock()
        self.weights, self.num_layers = Weights(model), len(model.config.layers)
        self.folder: Path | None = folder
        traced = _OneToken(model, self._keep)
        tokens, positions = torch.zeros(2, batch_size, dtype=torch.long, device="cpu")
        rows = empty_table(self.num_layers, batch_size)
        with torch.no_grad(), torch.autocast("cpu", enabled=False), use("cpp", folder):
            program = torch.export.export(traced, (tokens, positions, rows), strict=False)
            for module in model.layers.modules():
                if isinstance(module, AttentionModule):
                    module.compile_kernels()
        given = dict(program.constants)
        given |= dict(traced.named_parameters(remove_duplicate=False))
        given |= dict(traced.named_buffers(remove_duplicate=False))
        self.run, self.used = machine_code(program, given, folder)

    def _keep(self, left_out: _LeftOut) -> None:
        self.left_out = left_out

    def __call__(self, step: Step) -> Tensor:
        """Logits (B, V)."""
        # What is compiled looks at no dtype and no stride.
        tokens = step.tokens.long().contiguous()
        rows, held = row_table(self.left_out.in_place, self.num_layers, step)
        _running.step, _running.operations, _running.error = step, self.left_out.called_back, None
        try:
            # The package is loaded to run on one thread at a time: its runs share one state. What is called back lets
            # other threads of Python run meanwhile.
            with self.lock:
                logits: Tensor = self.run([tokens, step.positions, rows])[0]
            return logits
        except RuntimeError:
            # On its way through the machine code an error in an operation has lost what it is.
            if _running.error is not None:
                raise _running.error from None
            raise
        finally:
            del held, _running.step, _running.operations, _running.error


def machine_code(
    program: torch.export.ExportedProgram, weights: Mapping[str, Any], folder: Path
) -> tuple[Callable[[list[Tensor]], list[Tensor]], dict[str, Tensor]]:
    """The traced step as a function of its inputs, found in the folder or compiled there, and those of the weights
    that it uses, which it knows by their addresses: they must be held for as long as it is."""
    settings = {
        "aot_inductor.package_constants_in_so": False,
        "aot_inductor.compile_wrapper_opt_level": "O1",
        # Else short weights would be written into the code.
        "always_keep_tensor_constants": True,
    }
    file = folder / f"{_digest(program, weights, settings)}.pt2"
    with keeping_code_in(folder):
        if not is_kept(file):
            _compile(program, file, settings)
    try:
        code: Any = torch._inductor.aoti_load_package(str(file), run_single_threaded=True)
    except (OSError, RuntimeError) as error:
        raise InputError(f"compiled code in {file} cannot be read: delete it, and it is made anew") from error
    used = {name: weights[name].detach() for name in code.get_constant_fqns()}
    code.load_constants(used, check_full_update=True, user_managed=True)
    return code.loader.run, used


def _digest(program: torch.export.ExportedProgram, weights: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """Of everything that the machine code depends on."""
    # Without comments, which say where in which file of this machine an operation comes from.
    said = [line for line in str(program).splitlines() if not line.lstrip().startswith("#")]
    said += [f"{name} {tuple(w.shape)} {w.stride()} {w.dtype}" for name, w in sorted(weights.items())]
    said += [torch.__version__, processor(), str(torch.get_num_threads()), str(settings)]
    return hashlib.sha256("\n".join(said).encode()).hexdigest()[:32]


def _compile(program: torch.export.ExportedProgram, file: Path, settings: Mapping[str, Any]) -> None:
    """Aside first, so that whoever finds the file finds all of it."""
    with tempfile.TemporaryDirectory(dir=file.parent) as aside, warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's, of its own code
        made = torch._inductor.aoti_compile_and_package(
            program, package_path=str(Path(aside) / file.name), inductor_configs=dict(settings)
        )
        keep(Path(made), file)
