"""From a prompt to text: tokens in, tokens and complete characters out."""

from kvell.generation.generate import Piece, generate
from kvell.generation.sampling import Sampler, SamplingSettings
from kvell.generation.text import StopStrings, TextStream, Transcript
from kvell.generation.tokenizer import Tokenizer

__all__ = [
    "Piece",
    "Sampler",
    "SamplingSettings",
    "StopStrings",
    "TextStream",
    "Tokenizer",
    "Transcript",
    "generate",
]
