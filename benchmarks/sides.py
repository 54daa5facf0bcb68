"""Kvell and transformers behind the same few calls, which a worker answers.

Tokens are random but the same for both sides: position p holds the same token in every prompt.
"""

from abc import ABC, abstractmethod
from functools import cache
from itertools import pairwise
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from benchmarks.memory import forget_peak, peak_resident_bytes, resident_bytes

if TYPE_CHECKING:
    from kvell import Cache, Decoder

LONGEST = 1 << 21
# What one worker compiled the next one finds.
COMPILED = Path(__file__).resolve().parent.parent / "results" / "compiled"
CHUNK = 1024  # transformers is fed by so many tokens, which is faster and smaller than a prompt in one call


@cache
def _ids(vocabulary: int) -> Tensor:
    return torch.randint(1, vocabulary, (LONGEST,), generator=torch.Generator().manual_seed(0))


def sequence(start: int, stop: int, vocabulary: int) -> Tensor:
    """(1, stop - start): random tokens; never token 0, whose embedding some models do not train."""
    return _ids(vocabulary)[None, start:stop].clone()


def filled_cache(model: "Decoder", length: int) -> "Cache":
    """A cache as `length` tokens leave it, but for its rows, which are random: a decoded token takes as long."""
    kept = model.make_cache()
    (one,) = kept.sequences
    for stream in one.streams.values():
        rows = torch.randn(stream.spec.rows(length), stream.spec.width, device=stream.buffer.device)
        stream.fill(rows.to(stream.buffer.dtype))
    one.length = length
    return kept


class Side(ABC):
    """A model that is fed through its cache and timed."""

    def __init__(self) -> None:
        self._cache: Any = None
        self._length = 0
        self._at_rest = 0

    @abstractmethod
    def _load(self, folder: str, **options: Any) -> None: ...

    def _prepare(self) -> None:  # noqa: B027 - most have nothing to do
        """What a side does once with a loaded model to be faster from then on."""

    @abstractmethod
    def _make_cache(self) -> Any: ...

    @abstractmethod
    def _forward(self, tokens: Tensor, cache: Any) -> Tensor:
        """The last token's logits (V,), the tokens having entered the cache."""

    @abstractmethod
    def _nbytes(self, cache: Any) -> int: ...

    @property
    @abstractmethod
    def _vocabulary(self) -> int: ...

    def load(self, folder: str, **options: Any) -> dict[str, float]:
        """Loads and runs a few tokens, so that all weights are in memory: what is used above that is the work's."""
        start = perf_counter()
        self._load(folder, **options)
        seconds = perf_counter() - start
        start = perf_counter()
        self._prepare()
        compiling = perf_counter() - start
        warm = self._make_cache()
        for low, high in ((0, 32), (32, 33)):
            self._forward(sequence(low, high, self._vocabulary), warm)
        forget_peak()
        self._at_rest = resident_bytes()
        return {"seconds": seconds, "compile_seconds": compiling, "resident_bytes": self._at_rest}

    def logits(self, prompt: int, decoded: int) -> list[list[float]]:
        """The last logits of a prompt and of each token decoded after it."""
        new = self._make_cache()
        ends = [0, *range(prompt, prompt + decoded + 1)]
        rows = [self._forward(sequence(low, high, self._vocabulary), new) for low, high in pairwise(ends)]
        return torch.stack(rows).float().tolist()

    def prefill(self, tokens: int) -> dict[str, Any]:
        """Feeds a prompt into a new cache."""
        self.drop()
        return self.extend(tokens)

    def extend(self, tokens: int) -> dict[str, Any]:
        """Feeds what is missing until the cache holds so many tokens. The peak is the process's so far: long prompts
        come last."""
        ids = sequence(self._length, tokens, self._vocabulary)
        start = perf_counter()
        if self._cache is None:
            self._cache = self._make_cache()
        self._forward(ids, self._cache)
        seconds = perf_counter() - start
        self._length = tokens
        return {
            "seconds": seconds,
            "peak_bytes": peak_resident_bytes() - self._at_rest,
            "cache_bytes": self._nbytes(self._cache),
        }

    def decode(self, tokens: int) -> list[float]:
        """Seconds of each of so many more tokens, its most probable successor found."""
        seconds = []
        for _ in range(tokens):
            ids = sequence(self._length, self._length + 1, self._vocabulary)
            start = perf_counter()
            self._forward(ids, self._cache).argmax().item()
            seconds.append(perf_counter() - start)
            self._length += 1
        return seconds

    def drop(self) -> None:
        self._cache, self._length = None, 0

    def parameters(self) -> int:
        return sum(tensor.numel() for tensor in self._tensors())

    @abstractmethod
    def _tensors(self) -> list[Tensor]: ...


class KvellSide(Side):
    def _load(self, folder: str, **options: Any) -> None:
        import kvell

        self.model = kvell.from_pretrained(folder, **options).eval()

    def _prepare(self) -> None:
        self.model.compile_decoding(folder=COMPILED)

    @property
    def _vocabulary(self) -> int:
        return self.model.config.vocab_size

    def _make_cache(self) -> Any:
        return self.model.make_cache()

    def _forward(self, tokens: Tensor, cache: Any) -> Tensor:
        with torch.inference_mode():
            return self.model(tokens, cache=cache, last_only=True)[0, -1]

    def _nbytes(self, cache: Any) -> int:
        return int(cache.nbytes)

    def _tensors(self) -> list[Tensor]:
        return list(self.model.parameters())


class FreshSide(KvellSide):
    """Kvell with fresh weights, from a config's file."""

    def _load(self, folder: str, **options: Any) -> None:
        import kvell

        torch.manual_seed(0)
        self.model = kvell.Decoder(kvell.ModelConfig.from_pretrained(folder), **options).eval()

    def remember(self, tokens: int) -> dict[str, int]:
        """Stands behind so many tokens without having read them."""
        self.drop()
        self._cache, self._length = filled_cache(self.model, tokens), tokens
        return {"cache_bytes": self._nbytes(self._cache)}


class TransformersSide(Side):
    """In its best mode: scaled_dot_product_attention where the model has it, long prompts in chunks."""

    def _load(self, folder: str, **options: Any) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM

        kind = AutoConfig.from_pretrained(folder).model_type
        attention = "eager" if kind == "deepseek_v4" else "sdpa"
        model: Any = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention, dtype="auto")
        self.model = model.eval()

    @property
    def _vocabulary(self) -> int:
        return int(self.model.config.vocab_size)

    def _make_cache(self) -> Any:
        from transformers import DynamicCache

        return DynamicCache(config=self.model.config)

    @torch.inference_mode()
    def _forward(self, tokens: Tensor, cache: Any) -> Tensor:
        for piece in tokens.split(CHUNK, dim=1):
            logits = self.model(piece, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        return logits[0, -1]

    def _nbytes(self, cache: Any) -> int:
        return sum(tensor.nbytes for tensor in tensors_in(cache.layers).values())

    def _tensors(self) -> list[Tensor]:
        return list(self.model.parameters())


def tensors_in(value: Any) -> dict[int, Tensor]:
    """All tensors reachable through lists, dictionaries and attributes, each once."""
    if isinstance(value, Tensor):
        return {id(value): value}
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else None
    if parts is None:
        parts = vars(value).values() if hasattr(value, "__dict__") and not isinstance(value, type) else ()
    found: dict[int, Tensor] = {}
    for part in parts:
        found |= tensors_in(part)
    return found


SIDES: dict[str, type[Side]] = {"kvell": KvellSide, "fresh kvell": FreshSide, "transformers": TransformersSide}
