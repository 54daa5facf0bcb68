"""Multi-token prediction (MTP): a block behind the model that proposes the token after the next (DeepSeek V3, arXiv
2412.19437, section 2.2; DeepSeek V4, arXiv 2606.19348).

With the residual h_p after the last layer, of the token at position p, and the id of the token at p + 1:

    x = open(We norm(embedding(id))) + Wh norm(h_p)        a residual like the model's: every stream gets the token
    h' = layer(x),  logits of the token at p + 2 = head(norm(close(h')))

The embedding and the head are the model's; norms, layer and the collapse before the head are the block's own. h' can
take the place of h_p to propose one token more. What people get wrong: the pairing; a token's embedding meets the
residual of the token before it.
"""

from jaxtyping import Float
from torch import Tensor, nn

from kvell.config import DraftConfig, ModelConfig
from kvell.layer import Layer
from kvell.layers.linear import Linear
from kvell.layers.norms import RMSNorm
from kvell.step import Step


class DraftBlock(nn.Module):
    def __init__(self, config: ModelConfig, draft: DraftConfig) -> None:
        super().__init__()
        hidden, site = config.hidden_size, config.site(config.num_layers)
        self.embedding_norm = RMSNorm(hidden, config.norm_eps)
        self.residual_norm = RMSNorm(hidden, config.norm_eps)
        self.embedding_proj = Linear(hidden, hidden, bias=False)
        self.residual_proj = Linear(hidden, hidden, bias=False)
        self.ends = config.connection.build_ends(site)
        self.layer = Layer(config, draft.layer, config.num_layers, per_layer_embedding=False)
        self.norm = RMSNorm(hidden, config.norm_eps)

    def forward(
        self, streams: Float[Tensor, "T *C"], embedded: Float[Tensor, "T C"], step: Step
    ) -> tuple[Float[Tensor, "T C"], Float[Tensor, "T *C"]]:
        """What the head sees, and the block's own residual; `embedded` are the next tokens' embeddings."""
        before = self.residual_proj(self.residual_norm(streams).to(embedded.dtype))
        x = self.ends.open(self.embedding_proj(self.embedding_norm(embedded))) + before
        h = self.layer(x, step, None, None)
        return self.norm(self.ends.close(h)), h
