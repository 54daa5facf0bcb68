"""The computations that are worth more than one version: a reference to read and a fast one to run."""

from kvell.kernels.choice import use

__all__ = ["use"]
