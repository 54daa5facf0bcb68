"""From texts to tokens: a tokenizer of the corpus's own, and documents as ids."""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from kvell.errors import InputError
from kvell.generation.tokenizer_files import read_backend
from kvell.training.corpus import Document
from kvell.training.ends import BOS, EOS
from kvell.training.settings import NewTokenizer
from kvell.training.stopping import interruptibly, nothing

# Training a byte-pair encoding takes time in the square of a word's length.
LONGEST_WORD = 1024
# How many characters of documents are encoded at a time.
BATCH = 1 << 20
# What the pre-tokenizer takes for one word: letters, other signs, or white space. Python counts four control
# characters (0x1c to 0x1f) as white space that the pre-tokenizer counts as signs.
LONG_WORD = re.compile(
    rf"(?<![^\W\d_])[^\W\d_]{{{LONGEST_WORD + 1},}}"
    rf"|(?<![^\w\s]|[_\x1c-\x1f])(?:[^\w\s]|[_\x1c-\x1f]){{{LONGEST_WORD + 1},}}"
    rf"|(?<!\s)\s{{{LONGEST_WORD + 1},}}"
)


@dataclass(frozen=True)
class TokenDocument:
    """A document's ids, beginning and end included; those of its text are from `text_start` up to `text_stop`.

    `bytes_before` (N + 1), which held-out documents have, says for the place before every token, and for the
    document's end, how many bytes of the text lie before it; -1 for a place inside a character.
    """

    name: str
    ids: NDArray[np.int32]
    text_start: int
    text_stop: int
    bytes_before: NDArray[np.int64] | None = None

    def measured(self, seen: int | None = None) -> tuple[int, int, int]:
        """Of the first `seen` tokens, which can be measured against bytes: those from the first place up to the
        second, and how many bytes of text they are.

        A token is left out if nothing predicts it, as the first, if it is no text, as beginning and end, and if it
        shares a character with one that is left out.
        """
        assert self.bytes_before is not None
        stop = min(self.text_stop, len(self.ids) if seen is None else seen)
        places = np.arange(max(self.text_start, 1), stop + 1)
        places = places[self.bytes_before[places] >= 0]
        if not len(places):
            return 0, 0, 0
        first, last = int(places[0]), int(places[-1])
        return first, last, int(self.bytes_before[last] - self.bytes_before[first])


def train_tokenizer(
    settings: NewTokenizer, texts: Iterable[str], check: Callable[[], None] = nothing
) -> tokenizers.Tokenizer:
    """A byte-level BPE (Sennrich et al. 2016, arXiv 1508.07909), every digit by itself, BOS before every text.

    Words longer than LONGEST_WORD are learnt from in parts. `check` is called now and then, and may raise to end it.
    """
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

    def parts() -> Iterator[str]:
        for text in texts:
            check()
            yield from without_long_words(text)

    interruptibly(lambda: tokenizer.train_from_iterator(parts(), trainer), check)
    bos = (BOS, tokenizer.token_to_id(BOS))
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[bos])
    tokenizer.encode_special_tokens = True  # a document that spells BOS or EOS is text there too
    return tokenizer


def without_long_words(text: str) -> Iterator[str]:
    """A text whole, or, where it has words of more than LONGEST_WORD characters, in parts that have none."""
    start = 0
    for word in LONG_WORD.finditer(text):
        for cut in range(word.start() + LONGEST_WORD, word.end(), LONGEST_WORD):
            yield text[start:cut]
            start = cut
    yield text[start:]


def read_tokenizer(folder: str) -> tokenizers.Tokenizer:
    """The tokenizer of a directory. CheckpointError where there is none that can be read."""
    return read_backend(folder)


def tokenise(
    tokenizer: tokenizers.Tokenizer,
    documents: Sequence[Document],
    vocab_size: int,
    eos: int | None,
    measured: bool = False,
    check: Callable[[], None] = nothing,
) -> list[TokenDocument]:
    """Every document's ids; with `measured` they know where the bytes of their text lie. InputError for a tokenizer
    with ids that the model does not have. `check` is called now and then, and may raise to end it."""
    highest = max(tokenizer.get_vocab().values(), default=-1)
    if highest >= vocab_size:
        raise InputError(f"the tokenizer has {highest + 1} tokens, the model only {vocab_size}")
    made: list[TokenDocument] = []
    for batch in _batches(documents):
        encode = tokenizer.encode_batch if measured else tokenizer.encode_batch_fast
        encodings = interruptibly(partial(encode, [document.text for document in batch]), check)
        made += [_tokens(document, each, eos, measured) for document, each in zip(batch, encodings, strict=True)]
    return made


def _batches(documents: Sequence[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _tokens(document: Document, encoding: tokenizers.Encoding, eos: int | None, measured: bool) -> TokenDocument:
    added = np.array(encoding.special_tokens_mask, dtype=bool)
    text = np.flatnonzero(~added)
    start, stop = (int(text[0]), int(text[-1]) + 1) if len(text) else (len(added), len(added))
    ids = encoding.ids
    if eos is not None and ids[stop:] != [eos]:  # else the tokenizer has put it there
        ids = [*ids, eos]
    places = _places(document.text, encoding.offsets[start:stop]) if measured else None
    before = None
    if places is not None:
        before = np.concatenate([np.zeros(start), places, np.full(len(ids) - stop, places[-1])]).astype(np.int64)
    return TokenDocument(document.name, np.array(ids, dtype=np.int32), start, stop, before)


def _places(text: str, offsets: list[tuple[int, int]]) -> NDArray[np.int64]:
    """How many bytes of the text lie before each of N tokens and behind the last (N + 1), from the characters that
    each token spans; -1 where a token begins inside a character that the one before it has begun."""
    points = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    widths = 1 + (points > 0x7F).astype(np.int64) + (points > 0x7FF) + (points > 0xFFFF)
    nbytes = np.concatenate([[0], np.cumsum(widths)])
    if not offsets:
        return np.zeros(1, dtype=np.int64)
    starts, ends = np.array(offsets, dtype=np.int64).T
    reached = np.maximum.accumulate(ends)
    inner = np.where(starts[1:] >= reached[:-1], nbytes[reached[:-1]], -1)
    return np.concatenate([[0], inner, nbytes[-1:]])
