"""torch.compile in training: the token-wise parts of a model, each compiled by itself.

What stands around attention sees every token alone: connections and norms, dense feed-forwards, per-layer embeddings.
Their shapes are those of a micro-batch, which a stage fixes, however its pieces are cut: each is compiled once for a
stage. Attention, compressors and routers loop over pieces, or over experts' tokens, whose number and lengths differ
from step to step: they would be compiled anew for most steps, and run as ever.

Shapes are compiled in, not left open: a kernel for open shapes depends on the sizes that the run happened to see
first, and a run that goes on in a later stage would round otherwise than one that was never stopped.
"""

from typing import Any

import torch
from torch import nn

from kvell.hardware import check_compiler
from kvell.kernels import choice
from kvell.layer import Layer
from kvell.layers.contract import TokenWise
from kvell.model import Decoder

# A part's code is shared by all layers: it is compiled for every stage's shapes, and for each way the part is built.
VARIANTS = 256


def compile_parts(model: Decoder, device: torch.device) -> None:
    """Compiles the token-wise parts of the model's layers, at their first use in a training step. InputError where
    nothing can be compiled on the device."""
    check_compiler(device, "set compile to false")
    # What is compiled keeps the kernels' version that was chosen when it was compiled.
    torch.compiler.assume_constant_result(choice.chosen)
    torch._dynamo.config.recompile_limit = VARIANTS
    torch._dynamo.config.accumulated_recompile_limit = VARIANTS
    for layer in model.layers:
        assert isinstance(layer, Layer)
        connections: list[nn.Module] = [layer.attention_frame, layer.feed_forward_frame]
        if layer.per_layer_embedding is not None:
            connections.append(layer.per_layer_connection)
        # On a GPU hyper-connections have kernels of their own, 13 times as fast as what torch makes of them.
        if device.type == "cpu" or not layer.attention_frame.connection.has_gpu_kernels:
            for connection in connections:
                replace(connection, "read")
                replace(connection, "write")
        for module in layer.modules():
            if isinstance(module, TokenWise):
                replace(module, "forward")


def replace(module: nn.Module, name: str) -> None:
    """Puts a compiled method in the place of a module's own.

    Where no gradients are recorded the plain one runs: an evaluation's chunks have all lengths. A part that cannot be
    compiled whole, or is compiled for too many shapes, is an error: nothing falls back to the plain one in silence.
    """
    plain = getattr(module, name)
    compiled = torch.compile(plain, fullgraph=True, dynamic=False)

    def either(*values: Any) -> Any:
        return (compiled if torch.is_grad_enabled() else plain)(*values)

    setattr(module, name, either)
