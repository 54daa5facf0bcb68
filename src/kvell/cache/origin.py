"""Which model made a cache: its rows mean nothing to another one, whatever its shapes."""

from typing import Any, Protocol


class Fingerprinted(Protocol):
    """A model that can be identified by its config and weights."""

    def fingerprint(self) -> str: ...


class Origin:
    """The model that made a cache, or its fingerprint, where the cache came from another process.

    A fingerprint reads samples of every weight, so it is only worked out where it is needed: to save a cache, or to
    compare two models that are not the same object. Copies of a cache share their origin, and a pickled one carries
    the fingerprint in place of the model.
    """

    def __init__(self, model: Fingerprinted | None, fingerprint: str | None = None) -> None:
        self.model = model
        self._fingerprint = fingerprint

    def fingerprint(self) -> str:
        """The fingerprint of the model as it is now."""
        if self.model is not None:
            return self.model.fingerprint()
        assert self._fingerprint is not None
        return self._fingerprint

    def is_same(self, other: "Origin") -> bool:
        """Whether both are one model, or two of the same config and weights."""
        if self is other or (self.model is not None and self.model is other.model):
            return True
        return self.fingerprint() == other.fingerprint()

    def __copy__(self) -> "Origin":
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "Origin":
        return self

    def __reduce__(self) -> tuple[type["Origin"], tuple[None, str]]:
        return Origin, (None, self.fingerprint())
