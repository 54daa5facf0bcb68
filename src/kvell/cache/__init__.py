"""Everything that outlives a step: streams of rows, and the cache of a batch."""

from kvell.cache.cache import Cache, streams_nbytes

__all__ = ["Cache", "streams_nbytes"]
