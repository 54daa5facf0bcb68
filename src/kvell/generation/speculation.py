"""Speculative decoding: guessing tokens ahead, and reading several in one step of the model.

Leviathan et al. 2022, arXiv 2211.17192. A drafter proposes the next k tokens. The model reads the last token chosen
and the drafts in one step, which costs hardly more than a step of one token where a step's time is spent on fetching
the weights. Its logits of the k + 1 positions are then sampled one after the other: the token drawn at a position is
the text's, and as long as it is the one that was drafted, the next position's logits are the right ones too. At the
first difference the rest is dropped and the cache rewound.

A draft here is a token, not a distribution, so that this is the paper's rejection scheme in its simplest form: every
token is drawn from the model's own distribution, by the same draws of the same random numbers. What people get wrong:
drafts must change the time a text takes and nothing else. The text is plain generation's to the rounding of the
logits, which a step of several tokens may round otherwise than steps of one.
"""

import math
from array import array
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import cycle, islice, takewhile
from typing import Any, Literal, Protocol, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kvell.errors import InputError, whole_number
from kvell.generation.interface import DraftingModel, LanguageModel, SequenceCache
from kvell.generation.ngrams import NgramIndex

Speculate = Literal["off", "lookup", "mtp"]

_DEFAULT_DRAFTS = {"off": 0, "lookup": 8, "mtp": 3}


@dataclass(frozen=True)
class SpeculationSettings:
    """Who proposes tokens, and at most how many a step; None takes the drafter's default.

    By lookup 8: a proposal costs nothing, and a CPU reads 9 tokens in about the time of 2. Continuing Python files,
    a model of 1.9 M parameters got 2.0 tokens out of a step with 4 drafts, 2.15 with 8 and 2.3 with 16. By mtp 3: the
    block runs once for every draft, and was trained to make the first; later ones build on its own guesses.

    Raises InputError where a setting is not one that can be.
    """

    speculate: Speculate = "off"
    num_drafts: int | None = None

    def __post_init__(self) -> None:
        known = get_args(Speculate)
        if self.speculate not in known:
            raise InputError(f"speculate {self.speculate} is unknown: use one of {', '.join(known)}")
        if self.num_drafts is not None and self.speculate == "off":
            raise InputError(f"{self.num_drafts} drafts are asked for, but speculate is off: use lookup or mtp")
        if self.num_drafts is not None:
            whole_number("the number of drafts", self.num_drafts)

    @property
    def max_drafts(self) -> int:
        """At most so many are drafted in a step, and the cache must be able to take as many back."""
        return _DEFAULT_DRAFTS[self.speculate] if self.num_drafts is None else self.num_drafts

    def check_cache(self, cache: SequenceCache) -> None:
        """InputError for a cache that this cannot work with."""
        if self.speculate == "off":
            return
        if cache.max_rewind < self.max_drafts:
            raise InputError(
                f"the cache was made with max_rewind={cache.max_rewind}, and {self.max_drafts} drafts a step need "
                f"max_rewind={self.max_drafts}: make the cache with it, or draft fewer"
            )
        if self.speculate == "mtp" and cache.lengths[0]:
            raise InputError(
                f"the cache holds {cache.lengths[0]} tokens that the draft block has not seen: "
                'speculate="mtp" starts with an empty cache, "lookup" with any'
            )

    def make_drafter(self, model: LanguageModel, suppressed: Sequence[int] = ()) -> "Drafter":
        """Raises InputError for a model that lacks what it takes."""
        if self.speculate == "mtp":
            return MTPDrafter(_with_draft_block(model), self.max_drafts, suppressed)
        return LookupDrafter() if self.speculate == "lookup" else NoDrafter()


def _with_draft_block(model: LanguageModel) -> DraftingModel:
    if not isinstance(model, DraftingModel) or model.config.draft is None:
        raise InputError(
            'speculate="mtp" needs a model with a draft block, and this one has none (its config\'s draft is null): '
            '"lookup" works for every model'
        )
    return model


class Drafter(Protocol):
    """Proposes tokens that may follow a text. It is told of the text what the model has read."""

    @property
    def needs_streams(self) -> bool:
        """Whether it wants the model's streams."""
        ...

    def read(self, tokens: Sequence[int], streams: Float[Tensor, "1 n *C"] | None) -> None:
        """The text's next tokens, which the model has read, and the streams it made of them, if they are needed."""
        ...

    def propose(self, last: int, most: int) -> list[int]:
        """At most `most` tokens (1 or more) that may follow `last`, the text's last token, which the model has not
        read yet."""
        ...


class NoDrafter:
    """Proposes nothing: one step, one token."""

    needs_streams = False

    def read(self, tokens: Sequence[int], streams: Float[Tensor, "1 n *C"] | None) -> None:
        pass

    def propose(self, last: int, most: int) -> list[int]:
        return []


class LookupDrafter:
    """Proposes what followed when the text's last tokens occurred before: prompt lookup decoding (Saxena 2023,
    github.com/apoorvumang/prompt-lookup-decoding).

    The longest suffix of at most `max_ngram` tokens that has occurred before counts, and its latest occurrence.
    Where what followed reaches the end of the text, the text is repeating itself, and the proposal repeats on. An
    index for each length of n-grams says where each one's latest occurrence ended: a step's work does not grow with
    the text.
    """

    needs_streams = False

    def __init__(self, max_ngram: int = 3) -> None:
        self._text = array("i")
        self._indices = {size: NgramIndex(size) for size in range(max_ngram, 0, -1)}  # the longest first

    def read(self, tokens: Sequence[int], streams: Float[Tensor, "1 n *C"] | None) -> None:
        for token in tokens:
            self._text.append(token)
            end = len(self._text)
            for size, index in self._indices.items():
                if size <= end:
                    index.add(self._text, end)

    def propose(self, last: int, most: int) -> list[int]:
        # `last` is in no index yet, so whatever is found there is an earlier occurrence.
        self._text.append(last)
        end = len(self._text)
        found = (index.find(self._text, end) for size, index in self._indices.items() if size <= end)
        start = next((place for place in found if place is not None), None)
        followed = [] if start is None else self._text[start : start + most].tolist()
        self._text.pop()
        return list(islice(cycle(followed), most))


class MTPDrafter:
    """Proposes by a model's draft block: multi-token prediction (DeepSeek V3, arXiv 2412.19437, section 2.2; DeepSeek
    V4, arXiv 2606.19348).

    The block takes the model's streams of the token at position p with the id of the token at p + 1, and proposes the
    token at p + 2. It sees every position of the text once, with the model's own streams. For more than one draft its
    own streams and its own proposal stand in for what the model has not made yet; these rows are taken back. As the
    model's own choice, a draft is none of the `suppressed` tokens.
    """

    needs_streams = True

    def __init__(self, model: DraftingModel, num_drafts: int, suppressed: Sequence[int] = ()) -> None:
        self._model = model
        self._suppressed = torch.tensor(suppressed, dtype=torch.long, device=model.device)
        self._cache = model.make_draft_cache(max_rewind=num_drafts - 1)
        # Streams (1, n, ...) that the block has not seen, and the n - 1 tokens after all of them but the last, whose
        # next token is not known before the next call.
        self._waiting: tuple[Tensor, list[int]] | None = None

    def read(self, tokens: Sequence[int], streams: Float[Tensor, "1 n *C"] | None) -> None:
        assert streams is not None, "this drafter needs streams"
        if self._waiting is not None:
            self._feed_waiting(tokens[0])
        self._waiting = streams, list(tokens[1:])

    def propose(self, last: int, most: int) -> list[int]:
        logits, streams = self._feed_waiting(last)
        drafts = [self._most_probable(logits[:, -1:])]
        for _ in range(most - 1):
            logits, streams = self._model.draft(streams[:, -1:], drafts[-1], cache=self._cache)
            drafts.append(self._most_probable(logits))
        if most > 1:
            self._cache.rewind(most - 1)
        return torch.cat(drafts, dim=1)[0].tolist()  # fetched together: an accelerator is waited for once

    def _most_probable(self, logits: Float[Tensor, "1 1 V"]) -> Int[Tensor, "1 1"]:
        return logits.index_fill(-1, self._suppressed, -math.inf).argmax(dim=-1)

    def _feed_waiting(self, token: int) -> tuple[Float[Tensor, "1 n V"], Float[Tensor, "1 n *C"]]:
        """Shows the block what waits; `token` follows the last of it."""
        assert self._waiting is not None, "nothing has been read"
        streams, tokens = self._waiting
        self._waiting = None
        next_tokens = torch.tensor([[*tokens, token]], device=self._model.device)
        return self._model.draft(streams, next_tokens, cache=self._cache)


class Reader:
    """A model that reads a text into its cache, and drafts ahead of the text.

    `read` is for a prompt. From then on `logits` are about the next token, and `read_on` is told which it became. The
    cache holds what has been read, and up to `drop_drafts` all drafts of the step, the accepted ones and the others.
    Nothing is drafted from a token on that is in `barred`: no text goes on behind it.
    """

    def __init__(
        self,
        model: LanguageModel,
        cache: SequenceCache,
        drafter: Drafter,
        max_drafts: int,
        barred: Collection[int] = (),
    ) -> None:
        self._model, self._cache, self._drafter, self._max_drafts = model, cache, drafter, max_drafts
        self._barred = frozenset(barred)
        self._options: dict[str, Any] = {"return_streams": True} if drafter.needs_streams else {}
        # The last step: what it read, its streams, and its logits (k + 1, V) of its last token and its k drafts.
        self._tokens: list[int] = []
        self._drafts: list[int] = []
        self._accepted = 0
        self._logits = torch.empty(0)
        self._streams: Tensor | None = None

    @property
    def logits(self) -> Float[Tensor, " V"]:
        """About the token after all that was read and accepted."""
        return self._logits[self._accepted]

    @property
    def drafted(self) -> int | None:
        """The draft for that token, None where there is none."""
        return self._drafts[self._accepted] if self._accepted < len(self._drafts) else None

    def read(self, tokens: list[int]) -> None:
        """The text's next tokens, all of which are known."""
        self._finish_step()
        self._step(tokens, [])

    def read_on(self, token: int, remaining: int) -> None:
        """The text's next token, after which come at most `remaining` more, at least one."""
        if token == self.drafted:
            self._accepted += 1
            return
        self._finish_step()
        # A step gives one token more than it has drafts.
        most = min(self._max_drafts, remaining - 1)
        self._step([token], self._propose(token, most) if most > 0 else [])

    def drop_drafts(self) -> None:
        """Takes the drafts that are not accepted back out of the cache."""
        wrong = len(self._drafts) - self._accepted
        if wrong:
            del self._drafts[self._accepted :]
            self._cache.rewind(wrong)

    def _propose(self, token: int, most: int) -> list[int]:
        """Drafts that the text and the cache have room for."""
        if self._cache.max_length is not None:
            most = min(most, self._cache.max_length - self._cache.lengths[0] - 1)
        drafts = self._drafter.propose(token, most) if most > 0 else []
        return list(takewhile(lambda draft: draft not in self._barred, drafts))

    def _finish_step(self) -> None:
        """Tells the drafter what of the last step has become text."""
        self.drop_drafts()
        read = self._tokens + self._drafts
        if read:
            self._drafter.read(read, None if self._streams is None else self._streams[:, : len(read)])

    def _step(self, tokens: list[int], drafts: list[int]) -> None:
        fed = torch.tensor([[*tokens, *drafts]], device=self._model.device)
        output = self._model(fed, cache=self._cache, last_only=not drafts, **self._options)
        logits, self._streams = output if self._drafter.needs_streams else (output, None)
        self._logits = logits[0]
        self._tokens, self._drafts, self._accepted = tokens, drafts, 0
