"""Continuing a prompt, token by token."""

from collections.abc import Callable, Generator, Sequence
from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor

from kvell.errors import InputError, warn, whole_number
from kvell.generation.interface import LanguageModel, LanguageModelConfig, SequenceCache
from kvell.generation.sampling import Sampler, SamplingSettings
from kvell.generation.speculation import Reader, Speculate, SpeculationSettings
from kvell.generation.text import Transcript
from kvell.generation.tokenizer import Tokenizer

FinishReason = Literal["eos", "stop", "length"]


def default_prefill_chunk(device: torch.device) -> int:
    """Tokens of a prompt that are fed at a time: enough to keep the processor busy, few enough to show progress."""
    return 2048 if device.type == "cpu" else 16384


class Piece(int):
    """A generated token's id, with the text it released.

    `text` is empty while a character is unfinished or a stop string may have begun: later pieces bring it. A
    generation without a tokenizer knows no text: InputError where it is asked for. `finish_reason` is None on all
    pieces but the last. `drafted` says whether speculation had proposed the token: then it cost no step of the model.
    """

    finish_reason: FinishReason | None
    drafted: bool
    _text: str | None

    def __new__(
        cls, token_id: int, text: str | None = None, finish_reason: FinishReason | None = None, drafted: bool = False
    ) -> "Piece":
        piece = super().__new__(cls, token_id)
        piece._text = text
        piece.finish_reason = finish_reason
        piece.drafted = drafted
        return piece

    @property
    def text(self) -> str:
        if self._text is None:
            raise InputError("a piece has a text where generate knows the tokenizer: give it tokenizer=")
        return self._text

    def __repr__(self) -> str:
        text = "" if self._text is None else f"text={self._text!r}, "
        return f"Piece({int(self)}, {text}finish_reason={self.finish_reason!r}, drafted={self.drafted})"


def accepted_length(pieces: Sequence[Piece]) -> float | None:
    """Tokens per step of the model, the prompt and the token it gave apart; None where no other came.

    Every step ends with a token that was not drafted, unless the text ends before.
    """
    decoded = pieces[1:]
    if not decoded:
        return None
    return len(decoded) / (sum(not piece.drafted for piece in decoded) + decoded[-1].drafted)


def generate(
    model: LanguageModel,
    prompt_ids: Sequence[int] | Tensor,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    seed: int = 0,
    stop: str | Sequence[str] = (),
    tokenizer: Tokenizer | None = None,
    cache: SequenceCache | None = None,
    prefill_chunk: int | None = None,
    on_prefill: Callable[[int], None] | None = None,
    speculate: Speculate = "off",
    num_drafts: int | None = None,
    suppress_tokens: Sequence[int] | None = None,
) -> Generator[Piece, None, None]:
    """Yields the tokens that follow a prompt (ids, or a tensor of them of shape (T,)) as they are chosen. With a
    `tokenizer` each brings the text it released.

    The text ends at one of the model's end tokens ("eos"), at a stop string, which is not shown ("stop"), or
    after `max_new_tokens` ("length"). At temperature 0 the most probable token is taken, of equal ones the
    lowest id; `kvell.generation.sampling` says what the other settings do, and
    `kvell.GenerationDefaults.from_pretrained(path).sampling()` what a model's makers recommend. Tokens in
    `suppress_tokens` are never chosen: None stands for the config's, which generation_config.json may name.

    With a `cache` the prompt continues what the cache holds. Afterwards the cache holds everything but the
    last token yielded, which the model has not been given yet. The prompt is fed `prefill_chunk` tokens at a
    time (2,048 on the CPU, 16,384 on an accelerator), and `on_prefill` is told after each chunk how many have
    been fed.

    With `speculate` up to `num_drafts` tokens are guessed and then verified in one step, which gives the same text in
    less time: by "lookup" of what followed the last tokens before, in the prompt given and the text (8 drafts; for
    every model), or by the model's own draft block, "mtp" (3 drafts). A `cache` must then have been made with
    `max_rewind` of at least as many, and be empty for "mtp". It may be ahead of the tokens yielded, until the last
    one comes or the generator is closed. `kvell.generation.speculation` says more.

    Raises InputError at once for a prompt or setting the model cannot take, and warns where the text may grow
    past the positions the model was made for, and of a prompt that does not begin with exactly one of the BOS tokens
    that the model's config names.
    """
    stop = (stop,) if isinstance(stop, str) else tuple(stop)
    settings = SamplingSettings(temperature, top_k, top_p, min_p, seed)
    speculation = SpeculationSettings(speculate, num_drafts)
    max_new_tokens = whole_number("max_new_tokens", max_new_tokens)
    if prefill_chunk is None:
        prefill_chunk = default_prefill_chunk(model.device)
    prefill_chunk = whole_number("prefill_chunk", prefill_chunk)
    if stop and tokenizer is None:
        raise InputError("stop strings need a tokenizer")
    if "" in stop:
        raise InputError("a stop string is empty: every text would stop at once")
    prompt = _checked_prompt(prompt_ids, model.config.vocab_size)
    suppressed = _checked_suppressed(suppress_tokens, model.config)
    drafter = speculation.make_drafter(model, suppressed)
    if cache is None:
        cache = model.make_cache(max_rewind=speculation.max_drafts)
    if len(cache.lengths) != 1:
        raise InputError(f"the cache holds {len(cache.lengths)} sequences, and generate continues one")
    speculation.check_cache(cache)
    if not cache.lengths[0]:
        _hint_at_bos(prompt[:2].tolist(), model.config.bos_token_id)
    _warn_of_length(cache.lengths[0] + len(prompt) + max_new_tokens, model.config, cache)
    barred = {*model.config.eos_token_ids, *suppressed}
    return _pieces(
        Reader(model, cache, drafter, speculation.max_drafts, barred),
        torch.split(prompt, prefill_chunk),
        Sampler(settings, suppressed),
        None if tokenizer is None else Transcript(tokenizer, stop),
        model.config.eos_token_ids,
        max_new_tokens,
        on_prefill,
    )


def _checked_prompt(prompt_ids: Sequence[int] | Tensor, vocab_size: int) -> Int[Tensor, " T"]:
    if isinstance(prompt_ids, str):
        raise InputError("the prompt is text, and generate takes token ids: tokenizer.encode(text) makes them")
    try:
        prompt = torch.as_tensor(prompt_ids)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"the prompt is not a sequence of token ids: {error}") from error
    if prompt.numel() == 0:
        raise InputError("the prompt is empty: a model continues at least one token")
    if prompt.ndim != 1 or prompt.is_floating_point() or prompt.dtype == torch.bool:
        shape = tuple(prompt.shape)
        raise InputError(f"the prompt is {prompt.dtype} of shape {shape}, not one row of token ids")
    outside = prompt[(prompt < 0) | (prompt >= vocab_size)]
    if len(outside):
        raise InputError(f"token id {int(outside[0])} is outside the vocabulary of {vocab_size}")
    return prompt.long()


def _checked_suppressed(suppress_tokens: Sequence[int] | None, config: LanguageModelConfig) -> list[int]:
    """Ids of the vocabulary that are never chosen; others mean nothing, as in transformers."""
    given = config.suppress_tokens if suppress_tokens is None else suppress_tokens
    ids = {whole_number("an id in suppress_tokens", one, 0) for one in given}
    suppressed = sorted(one for one in ids if one < config.vocab_size)
    if len(suppressed) == config.vocab_size:
        raise InputError("suppress_tokens names the whole vocabulary: no token is left to choose")
    return suppressed


def _hint_at_bos(beginning: list[int], bos: int | None) -> None:
    """Says of a text that begins without the BOS token of its model, or with two, what usually is meant."""
    if bos is None:
        return
    if beginning[0] != bos:
        warn(
            f"the prompt does not begin with BOS, token {bos}, which the model's config names: many models lose the "
            f"thread without it. Put [{bos}] before the ids, or set add_bos_token in tokenizer_config.json"
        )
    elif beginning == [bos, bos]:
        warn(f"the prompt begins with BOS, token {bos}, twice: text that spells it needs add_special_tokens=False")


def _warn_of_length(length: int, config: LanguageModelConfig, cache: SequenceCache) -> None:
    """Once, and before the model would where it comes to that."""
    if length > config.max_positions and not cache.warned_of_length:
        cache.warned_of_length = True
        warn(
            f"the text may reach {length} tokens and the model was made for {config.max_positions}: "
            "it may lose the thread beyond them"
        )


def _pieces(
    reader: Reader,
    chunks: Sequence[Int[Tensor, " _"]],
    sampler: Sampler,
    transcript: Transcript | None,
    eos_token_ids: tuple[int, ...],
    max_new_tokens: int,
    on_prefill: Callable[[int], None] | None,
) -> Generator[Piece, None, None]:
    _prefill(reader, chunks, on_prefill)
    try:
        for count in range(1, max_new_tokens + 1):
            token = sampler(reader.logits)
            drafted = token == reader.drafted
            reason = _finish_reason(token, count, max_new_tokens, eos_token_ids)
            text: str | None = None
            if transcript is not None:
                text, reason = _release(transcript, token, reason)
            if reason is not None or not drafted:
                reader.drop_drafts()
            yield Piece(token, text, reason, drafted)
            if reason is not None:
                return
            reader.read_on(token, max_new_tokens - count)
    finally:
        reader.drop_drafts()  # also of a text that is left where it is


def _prefill(reader: Reader, chunks: Sequence[Int[Tensor, " _"]], on_prefill: Callable[[int], None] | None) -> None:
    fed = 0
    for chunk in chunks:
        reader.read(chunk.tolist())
        fed += len(chunk)
        if on_prefill is not None:
            on_prefill(fed)


def _finish_reason(
    token: int, count: int, max_new_tokens: int, eos_token_ids: tuple[int, ...]
) -> FinishReason | None:
    if token in eos_token_ids:
        return "eos"
    return "length" if count == max_new_tokens else None


def _release(transcript: Transcript, token: int, reason: FinishReason | None) -> tuple[str, FinishReason | None]:
    """The text a token releases, and why the generation ends with it, knowing the text."""
    if reason == "eos":
        return transcript.flush(), reason
    text = transcript.push(token)
    if transcript.stopped:
        return text, "stop"
    return (text + transcript.flush() if reason else text), reason
