"""Kvell: the LLM architectures that made long contexts cheap.

The names below are imported when they are first used, so that `kvell --help` need not wait for torch.
"""

import gc
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvell.cache import Cache
    from kvell.checkpoint import from_pretrained
    from kvell.config import ModelConfig
    from kvell.errors import CacheError, CheckpointError, ConfigError, InputError, KvellError
    from kvell.families import GenerationDefaults
    from kvell.generation import Piece, Tokenizer, generate
    from kvell.layers.registry import register
    from kvell.model import Decoder
    from kvell.planning import Plan, plan

__version__ = "0.1.0"

_HOMES = {
    "Cache": "kvell.cache",
    "CacheError": "kvell.errors",
    "CheckpointError": "kvell.errors",
    "ConfigError": "kvell.errors",
    "Decoder": "kvell.model",
    "GenerationDefaults": "kvell.families",
    "InputError": "kvell.errors",
    "KvellError": "kvell.errors",
    "ModelConfig": "kvell.config",
    "Piece": "kvell.generation",
    "Plan": "kvell.planning",
    "Tokenizer": "kvell.generation",
    "from_pretrained": "kvell.checkpoint",
    "generate": "kvell.generation",
    "plan": "kvell.planning",
    "register": "kvell.layers.registry",
}

__all__ = [
    "Cache",
    "CacheError",
    "CheckpointError",
    "ConfigError",
    "Decoder",
    "GenerationDefaults",
    "InputError",
    "KvellError",
    "ModelConfig",
    "Piece",
    "Plan",
    "Tokenizer",
    "from_pretrained",
    "generate",
    "plan",
    "register",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'kvell' has no attribute {name!r}")
    # A full collection during an import looks at all of torch's objects and frees none: a third of the time.
    collecting = gc.isenabled()
    gc.disable()
    try:
        value = getattr(import_module(_HOMES[name]), name)
    finally:
        if collecting:
            gc.enable()
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
