"""What a context costs."""

from kvell.planning.cache_bytes import cache_nbytes, full_attention_nbytes

__all__ = ["cache_nbytes", "full_attention_nbytes"]
