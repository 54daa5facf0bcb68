"""Everything that outlives a step: streams of rows, and the cache of a batch."""

from kvell.cache.cache import Cache, StreamKey, StreamSpecs, reserved_nbytes, streams_nbytes
from kvell.cache.stream import StreamSpec

__all__ = ["Cache", "StreamKey", "StreamSpec", "StreamSpecs", "reserved_nbytes", "streams_nbytes"]
