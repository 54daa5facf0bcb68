"""From a prompt to text: tokens in, tokens and complete characters out."""

from kvell.generation.generate import Piece, accepted_length, generate
from kvell.generation.sampling import Sampler, SamplingSettings
from kvell.generation.speculation import Drafter, LookupDrafter, MTPDrafter, SpeculationSettings
from kvell.generation.text import StopStrings, TextStream, Transcript
from kvell.generation.tokenizer import Tokenizer

__all__ = [
    "Drafter",
    "LookupDrafter",
    "MTPDrafter",
    "Piece",
    "Sampler",
    "SamplingSettings",
    "SpeculationSettings",
    "StopStrings",
    "TextStream",
    "Tokenizer",
    "Transcript",
    "accepted_length",
    "generate",
]
