"""Models in files: safetensors in and out."""

from kvell.checkpoint.loading import build_empty, from_pretrained
from kvell.checkpoint.saving import save_pretrained

__all__ = ["build_empty", "from_pretrained", "save_pretrained"]
