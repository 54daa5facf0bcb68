"""From texts to tokens: a tokenizer of the corpus's own, and documents as ids."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from kvell.errors import CheckpointError, InputError
from kvell.training.corpus import Document
from kvell.training.settings import NewTokenizer

BOS, EOS = "<|bos|>", "<|eos|>"


@dataclass(frozen=True)
class TokenDocument:
    """A document's ids, beginning and end included, and how many bytes of text they stand for."""

    name: str
    ids: NDArray[np.int32]
    nbytes: int


def train_tokenizer(settings: NewTokenizer, texts: Iterable[str]) -> tokenizers.Tokenizer:
    """A byte-level BPE (Sennrich et al. 2016, arXiv 1508.07909), every digit by itself, BOS before every text."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocab_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    bos = (BOS, tokenizer.token_to_id(BOS))
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[bos])
    return tokenizer


def read_tokenizer(folder: str) -> tokenizers.Tokenizer:
    """The tokenizer.json of a directory. CheckpointError where there is none that can be read."""
    file = Path(folder) / "tokenizer.json"
    try:
        return tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing more specific
        raise CheckpointError(f"{file} cannot be read: {error}") from None


def tokenise(
    tokenizer: tokenizers.Tokenizer, documents: list[Document], vocab_size: int, eos: int | None
) -> list[TokenDocument]:
    """Every document's ids. InputError for a tokenizer with more tokens than the model."""
    if tokenizer.get_vocab_size() > vocab_size:
        raise InputError(f"the tokenizer has {tokenizer.get_vocab_size()} tokens, the model only {vocab_size}")
    encodings = tokenizer.encode_batch([document.text for document in documents])
    end = [] if eos is None else [eos]
    return [
        TokenDocument(document.name, np.array([*encoding.ids, *end], dtype=np.int32), len(document.text.encode()))
        for document, encoding in zip(documents, encodings, strict=True)
    ]
