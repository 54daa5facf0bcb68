"""How the blocks of a fresh model begin: by adding next to nothing to the residual."""

import torch

from kvell.layer import Layer
from kvell.model import Decoder

# What a block with a norm behind it adds at first, as a share of an embedded token.
NORMED_SHARE = 0.01


@torch.no_grad()
def quiet_start(model: Decoder) -> None:
    """Output projections start at zero, so a block adds nothing until its first step.

    Where a norm stands behind the block, the norm's weight starts small instead, at a hundredth of an embedded
    token's root mean square: a zero projection in front of an RMSNorm has the slope 1 / sqrt(eps) = 1000. With so
    small a weight all blocks of a deep model together stay below the token itself, and the first gradient is about
    that of pre-norm blocks. It is not zero, so what stands before the norm learns from the first step.
    """
    embedded = model.config.initializer_range * model.config.embedding_scale
    for layer in model.modules():
        if isinstance(layer, Layer):
            for weight in layer.output_weights():
                weight.fill_(0 if weight.dim() > 1 else NORMED_SHARE * embedded)
