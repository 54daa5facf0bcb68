"""generation_config.json: how a model's makers want its text to be generated (transformers' GenerationConfig).

What a model is wrong without becomes part of its ModelConfig: where a text ends, and tokens that it must never say.
The rest are defaults that a caller may take or leave.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvell.config import ModelConfig
from kvell.errors import CheckpointError
from kvell.files import read_json

GENERATION = "generation_config.json"

# Keys that change no token that Kvell chooses, and why.
HARMLESS = frozenset(
    {
        # how long a text may become, which the caller says
        *("max_length", "max_new_tokens"),
        # how fast it comes, and what is kept or returned beside it
        *("use_cache", "cache_implementation", "cache_config", "max_cache_len", "prefill_chunk_size", "low_memory"),
        *("compile_config", "disable_compile", "continuous_batching_config", "num_return_sequences"),
        *("output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate"),
        # speculation, which changes no text
        *("use_mtp", "is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule", "speculation_type"),
        *("assistant_confidence_threshold", "assistant_early_exit", "assistant_lookbehind", "target_lookbehind"),
        *("prompt_lookup_num_tokens", "max_matching_ngram_size"),
        # config.json and the tokenizer say these
        *("pad_token_id", "bos_token_id", "decoder_start_token_id"),
        # beams alone use these, and num_beams is looked at
        *("length_penalty", "early_stopping"),
        # the sampler renormalises by itself, and refuses logits that are no numbers
        *("renormalize_logits", "remove_invalid_values"),
        *("transformers_version", "trust_remote_code"),
    }
)
# Keys whose neutral value is 1. At null, false, 0 and what is empty, no key changes anything.
NEUTRAL_AT_1 = frozenset(
    {
        *("repetition_penalty", "encoder_repetition_penalty", "typical_p", "guidance_scale"),
        *("num_beams", "num_beam_groups"),
    }
)
DEFAULT_TOP_K = 50  # transformers' where a file samples and names none; its other defaults filter nothing


@dataclass(frozen=True)
class GenerationDefaults:
    """What a generation_config.json says; without one, greedy choice among all tokens.

    `suppress_tokens` are ids that are never chosen, and `eos_token_ids` end a text: a ModelConfig has both already.
    `do_sample` says whether `temperature`, `top_k`, `top_p` and `min_p` are in use; None where the file has no such
    value. `unsupported` are keys that would change the text and that Kvell does not obey.
    """

    eos_token_ids: tuple[int, ...] = ()
    suppress_tokens: tuple[int, ...] = ()
    do_sample: bool = False
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    unsupported: tuple[str, ...] = ()

    @classmethod
    def from_pretrained(cls, path: str | Path) -> "GenerationDefaults":
        """Those of a model's directory, or of a repository on the hub. CheckpointError, with the file and the key,
        for a value that cannot be."""
        from kvell.families import locate

        folder = locate(path, [GENERATION])
        return cls.read((folder if folder.is_dir() else folder.parent) / GENERATION)

    @classmethod
    def read(cls, file: Path) -> "GenerationDefaults":
        """Those of a file, which need not be there."""
        if not file.exists():
            return cls()
        values = _Values(file, read_json(file))
        known = {
            "eos_token_ids": values.ids("eos_token_id"),
            "suppress_tokens": values.ids("suppress_tokens"),
            "do_sample": values.get("do_sample", lambda value: isinstance(value, bool), "true or false") or False,
            "temperature": values.number("temperature", lambda value: 0 <= value < math.inf, "of at least 0"),
            "top_k": values.get("top_k", lambda value: _is_whole(value) and value >= 0, "a whole number from 0 on"),
            "top_p": values.number("top_p", lambda value: 0 < value <= 1, "above 0 and at most 1"),
            "min_p": values.number("min_p", lambda value: 0 <= value <= 1, "between 0 and 1"),
        }
        return cls(**known, unsupported=values.others({"eos_token_id", *known}))

    def sampling(self) -> dict[str, Any]:
        """The settings that `kvell.generate` takes: temperature, top_k, top_p, min_p.

        As in transformers a file that does not ask for sampling is greedy whatever else it says, one that does has
        temperature 1 and the 50 most probable tokens unless it says otherwise, and a top_k of 0 filters nothing.
        """
        if not self.do_sample:
            return {"temperature": 0.0, "top_k": None, "top_p": None, "min_p": None}
        temperature = 1.0 if self.temperature is None else self.temperature
        top_k = DEFAULT_TOP_K if self.top_k is None else self.top_k or None
        return {"temperature": temperature, "top_k": top_k, "top_p": self.top_p, "min_p": self.min_p}

    def added_to(self, config: ModelConfig) -> ModelConfig:
        """The config with what this says besides. Where both name the ends of a turn, this is the fuller: Gemma 4's
        names two, its config one."""
        more = [one for one in self.eos_token_ids if one not in config.eos_token_ids]
        ends = (*config.eos_token_ids, *more)
        suppressed = self.suppress_tokens or config.suppress_tokens
        if (ends, suppressed) == (config.eos_token_ids, config.suppress_tokens):
            return config
        return config.model_copy(update={"eos_token_ids": ends, "suppress_tokens": suppressed})


def updated(file: Path, config: ModelConfig) -> dict[str, Any] | None:
    """What the file must say beside a saved model so that its config is read back as it is; None where nothing has
    to change. Sampling defaults, which are not the model's, stay."""
    values = read_json(file) if file.is_file() else {}
    stands = GenerationDefaults.read(file)
    changes: dict[str, Any] = {}
    if stands.suppress_tokens != config.suppress_tokens:
        changes["suppress_tokens"] = list(config.suppress_tokens) or None
    if not set(stands.eos_token_ids) <= set(config.eos_token_ids):
        changes["eos_token_id"] = list(config.eos_token_ids) or None
    return values | changes if changes else None


class _Values:
    """A file's values, asked for one by one."""

    def __init__(self, file: Path, values: Mapping[str, Any]) -> None:
        self._file, self._values = file, values

    def get(self, name: str, allowed: Callable[[Any], bool], wanted: str) -> Any:
        """The value of a key, None where it is absent or null."""
        value = self._values.get(name)
        if value is not None and not allowed(value):
            raise CheckpointError(f"{self._file}: {name} is {value!r:.80}, wanted is {wanted}")
        return value

    def number(self, name: str, allowed: Callable[[float], bool], wanted: str) -> float | None:
        def is_allowed(value: Any) -> bool:
            return isinstance(value, int | float) and not isinstance(value, bool) and allowed(value)

        value = self.get(name, is_allowed, f"a number {wanted}")
        return None if value is None else float(value)

    def ids(self, name: str) -> tuple[int, ...]:
        def are_ids(value: Any) -> bool:
            return all(_is_whole(one) and one >= 0 for one in (value if isinstance(value, list) else [value]))

        value = self.get(name, are_ids, "a token's id or a list of them")
        return () if value is None else tuple(value) if isinstance(value, list) else (value,)

    def others(self, known: set[str]) -> tuple[str, ...]:
        """Keys that ask for something and are neither known nor harmless."""
        return tuple(
            name
            for name, value in self._values.items()
            if name not in known | HARMLESS
            and not name.startswith("_")
            and value not in (None, False, [], {}, "")
            and not (name in NEUTRAL_AT_1 and value == 1)
        )


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
