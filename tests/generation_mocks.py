"""A model and tokenizers small enough to follow by hand: what surrounds a model is tested without one."""

import sys
import time
from collections.abc import Container, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn

CORPUS = ["the cat sat on the mat, and the dog did not", "naïve café 🙂 日本語 שלום", "END of the end\n\nEND"]
SPECIAL_TOKENS = ["<bos>", "<eos>"]


@dataclass(frozen=True)
class MockConfig:
    vocab_size: int = 50
    max_positions: int = 1000
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    suppress_tokens: tuple[int, ...] = ()
    draft: object | None = None


@dataclass
class MockCache:
    """Remembers every token, and the sizes of the chunks they came in. It takes back no more than it may."""

    tokens: list[Any] = field(default_factory=list)
    chunks: list[int] = field(default_factory=list)
    batch_size: int = 1
    max_rewind: int = 0
    max_length: int | None = None
    rewindable: int = 0
    warned_of_length: bool = False

    @property
    def lengths(self) -> list[int]:
        return [len(self.tokens)] * self.batch_size

    @property
    def nbytes(self) -> int:
        return 2 * len(self.tokens)

    def add(self, tokens: list[Any]) -> None:
        self.tokens += tokens
        self.chunks.append(len(tokens))
        self.rewindable = min(self.max_rewind, self.rewindable + len(tokens))
        assert self.max_length is None or len(self.tokens) <= self.max_length, "more than the cache was made for"

    def rewind(self, tokens: int) -> None:
        assert 0 < tokens <= self.rewindable, "no more than that can be taken back"
        del self.tokens[-tokens:]
        self.rewindable -= tokens


class MockModel(nn.Module):
    """Its logits depend on every token seen and on their order.

    With a `script` it says those tokens after a prompt of `prompt_length` tokens, then goes on at random. `delay`
    seconds pass in each step.
    """

    def __init__(
        self,
        config: MockConfig,
        script: Sequence[int] = (),
        prompt_length: int = 1,
        delay: float = 0.0,
    ) -> None:
        super().__init__()
        self.config = config
        self.script = list(script)
        self.prompt_length = prompt_length
        self.delay = delay
        self.device = torch.device("cpu")
        self.dtype = torch.float32

    def make_cache(self, batch_size: int = 1, max_rewind: int = 0, max_length: int | None = None) -> MockCache:
        return MockCache(batch_size=batch_size, max_rewind=max_rewind, max_length=max_length)

    def forward(self, tokens: Tensor, cache: MockCache, last_only: bool = False) -> Tensor:
        assert last_only or (cache.max_rewind and tokens.shape[1] > 1), "only drafts need more than the last logits"
        time.sleep(self.delay)
        before = len(cache.tokens)
        cache.add(tokens[0].tolist())
        ends = range(before + 1, len(cache.tokens) + 1)
        return torch.stack([self.logits(cache.tokens[:end]) for end in (ends[-1:] if last_only else ends)])[None]

    def logits(self, tokens: Sequence[int]) -> Tensor:
        """Of the token after these."""
        said = len(tokens) - self.prompt_length
        if 0 <= said < len(self.script):
            return nn.functional.one_hot(torch.tensor(self.script[said]), self.config.vocab_size).float()
        generator = torch.Generator().manual_seed(hash(tuple(tokens)) % 2**63)
        return torch.randn(self.config.vocab_size, generator=generator)


class MockDraftingModel(MockModel):
    """Its draft block knows what the model would say, and says something else at the positions in `wrong`.

    A position's streams are (position, token, 0), and (position, token, 1) where the block's own stand in for them.
    The block remembers the pairs it was given and refuses any that does not continue them.
    """

    def __init__(self, config: MockConfig, wrong: Container[int] = (), **options: Any) -> None:
        super().__init__(replace(config, draft="a block"), **options)
        self.wrong = wrong
        self.draft_cache = MockCache()

    def make_draft_cache(self, batch_size: int = 1, max_rewind: int = 0, max_length: int | None = None) -> MockCache:
        self.draft_cache = self.make_cache(batch_size, max_rewind, max_length)
        return self.draft_cache

    def forward(self, tokens: Tensor, cache: MockCache, last_only: bool = False, return_streams: bool = False) -> Any:
        before = len(cache.tokens)
        logits = super().forward(tokens, cache, last_only)
        rows = [[before + index, token, 0] for index, token in enumerate(tokens[0].tolist())]
        return (logits, torch.tensor([rows], dtype=torch.float32)) if return_streams else logits

    def draft(self, streams: Tensor, next_tokens: Tensor, cache: MockCache) -> tuple[Tensor, Tensor]:
        assert cache is self.draft_cache
        assert streams.shape == (*next_tokens.shape, 3)
        rows, logits, own = [*cache.tokens], [], []
        for (position, token, stand_in), following in zip(streams[0].tolist(), next_tokens[0].tolist(), strict=True):
            assert position == len(rows), "every position once and in order"
            assert not rows or rows[-1][1] == token, "streams of the token that the row before was told comes next"
            assert stand_in or not any(row[2] for row in rows), "rows with its own streams were to be taken back"
            rows.append((token, following, stand_in))
            row = self.logits([row[0] for row in rows] + [following])
            logits.append(row.roll(1) if position + 2 in self.wrong else row)
            own.append([position + 1, following, 1])
        cache.add(rows[len(cache.tokens) :])
        return torch.stack(logits)[None], torch.tensor([own], dtype=torch.float32)


def byte_level_backend(added: Sequence[str] = ()) -> tokenizers.Tokenizer:
    """Byte-level BPE, with special tokens and with tokens that were added as plain text."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_tokens(["日本語", *added])
    return backend


def byte_fallback_backend() -> tokenizers.Tokenizer:
    """Whole words and, for what is not among them, bytes: as SentencePiece does it."""
    words = ["▁", "▁the", "▁cat", "s", "é", "\N{REPLACEMENT CHARACTER}", "\n"]
    vocabulary = [*SPECIAL_TOKENS, *words, *(f"<0x{byte:02X}>" for byte in range(256))]
    backend = tokenizers.Tokenizer(
        models.BPE({token: index for index, token in enumerate(vocabulary)}, [], byte_fallback=True)
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(SPECIAL_TOKENS)
    return backend


def metaspace_backend() -> tokenizers.Tokenizer:
    """Words whose leading space is dropped at the beginning of a text."""
    words = {word: index for index, word in enumerate([*SPECIAL_TOKENS, "▁the", "▁cat", "▁", "s", "▁▁"])}
    backend = tokenizers.Tokenizer(models.WordLevel(words, unk_token="s"))
    backend.decoder = decoders.Metaspace()
    backend.add_special_tokens(SPECIAL_TOKENS)
    return backend


def word_backend() -> tokenizers.Tokenizer:
    """No decoder at all: words joined by spaces."""
    words = {word: index for index, word in enumerate([*SPECIAL_TOKENS, "the", "cat", "sat"])}
    backend = tokenizers.Tokenizer(models.WordLevel(words, unk_token="cat"))
    backend.add_special_tokens(SPECIAL_TOKENS)
    return backend


def install(patch: pytest.MonkeyPatch, model: nn.Module, bundled: Path) -> None:
    """Makes the command line load `model`, whatever it is asked for; `bundled` is the bundled model's place."""
    import kvell

    planning, bundle = ModuleType("kvell.planning"), ModuleType("kvell.bundled")
    planning.full_attention_nbytes = lambda config, tokens, dtype: 1000 * tokens  # type: ignore[attr-defined]
    bundle.bundled_model_path = lambda: bundled  # type: ignore[attr-defined]
    patch.setitem(sys.modules, "kvell.planning", planning)
    patch.setitem(sys.modules, "kvell.bundled", bundle)
    patch.setattr(kvell, "from_pretrained", lambda path, **options: model, raising=False)
