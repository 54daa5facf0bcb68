"""A model and tokenizers small enough to follow by hand: what surrounds a model is tested without one."""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

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


@dataclass
class MockCache:
    """Remembers every token, and the sizes of the chunks they came in."""

    tokens: list[int] = field(default_factory=list)
    chunks: list[int] = field(default_factory=list)
    batch_size: int = 1

    @property
    def lengths(self) -> list[int]:
        return [len(self.tokens)] * self.batch_size

    @property
    def nbytes(self) -> int:
        return 2 * len(self.tokens)


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
        return MockCache(batch_size=batch_size)

    def forward(self, tokens: Tensor, cache: MockCache, last_only: bool = False) -> Tensor:
        assert last_only, "generation needs the last token's logits only"
        time.sleep(self.delay)
        cache.tokens += tokens[0].tolist()
        cache.chunks.append(tokens.shape[1])
        said = len(cache.tokens) - self.prompt_length
        if 0 <= said < len(self.script):
            return nn.functional.one_hot(torch.tensor([[self.script[said]]]), self.config.vocab_size).float()
        generator = torch.Generator().manual_seed(hash(tuple(cache.tokens)) % 2**63)
        return torch.randn(1, 1, self.config.vocab_size, generator=generator)


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
    patch.setattr(kvell, "from_pretrained", lambda path, dtype, device: model, raising=False)
