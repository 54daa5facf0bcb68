"""What a context costs."""

from kvell.planning.full_attention import full_attention_nbytes
from kvell.planning.plan import Plan, batch_that_fits, context_that_fits, plan

__all__ = ["Plan", "batch_that_fits", "context_that_fits", "full_attention_nbytes", "plan"]
