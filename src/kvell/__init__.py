"""Kvell: the LLM architectures that made long contexts cheap."""

from kvell.cache import Cache
from kvell.checkpoint import from_pretrained
from kvell.config import ModelConfig
from kvell.errors import CacheError, CheckpointError, ConfigError, InputError, KvellError
from kvell.generation import Piece, generate
from kvell.model import Decoder

__version__ = "0.1.0"

__all__ = [
    "Cache",
    "CacheError",
    "CheckpointError",
    "ConfigError",
    "Decoder",
    "InputError",
    "KvellError",
    "ModelConfig",
    "Piece",
    "from_pretrained",
    "generate",
]
