"""Which keys of a released config.json are known, and what becomes of the rest.

Every key is one of four, and each family's file lists its own:

    used         read, and the model depends on it
    harmless     not read, and the logits do not depend on it; with the reason
    unsupported  asks for what Kvell does not build; refused, with the reason, unless its value is one that asks for
                 nothing
    unknown      all others: refused by name, for nobody knows what they change

Objects within a config have keys of their own, known by their path: `rope_parameters.full_attention.factor`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from kvell.errors import ConfigError, warn

# The values that change nothing, and why any other value is refused.
Unsupported = tuple[tuple[Any, ...], str]


@dataclass(frozen=True)
class Keys:
    """The keys that an object may have. `objects` are used keys whose values are objects themselves, with the keys
    that those may have; a function of the object where these depend on its contents."""

    used: frozenset[str] = frozenset()
    harmless: Mapping[str, str] = field(default_factory=dict)
    unsupported: Mapping[str, Unsupported] = field(default_factory=dict)
    objects: "Mapping[str, KeysOf]" = field(default_factory=dict)

    def names(self) -> frozenset[str]:
        return self.used | self.harmless.keys() | self.unsupported.keys() | self.objects.keys()


def named(words: str) -> frozenset[str]:
    """The names in a text."""
    return frozenset(words.split())


def because(reason: str, words: str) -> dict[str, str]:
    """The names in a text, all with the same reason."""
    return dict.fromkeys(words.split(), reason)


KeysOf = Keys | Callable[[Mapping[str, Any]], Keys]


def keys_of(known: KeysOf, values: Mapping[str, Any]) -> Keys:
    return known if isinstance(known, Keys) else known(values)


def check_keys(where: str, values: Mapping[str, Any], keys: Keys, strict: bool) -> None:
    """ConfigError for an unsupported key. Unknown keys are a ConfigError where `strict`, else one warning. `where`
    begins the message."""
    unknown: dict[str, Keys] = {}
    refused: list[str] = []
    _sort(values, keys, "", unknown, refused)
    found = ", ".join(_hinted(path, known) for path, known in list(unknown.items())[:5])
    found += f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
    if unknown and strict:  # first, for a name misspelt may be why others are refused
        raise ConfigError(
            f"{where}: {found}: unknown, and may change what the model computes; strict=False or --lenient leaves "
            "it out"
        )
    if refused:
        raise ConfigError(f"{where}: {refused[0]}")
    if unknown:
        warn(f"{where}: unknown keys are left out: {found}")


def _sort(values: Mapping[str, Any], keys: Keys, path: str, unknown: dict[str, Keys], refused: list[str]) -> None:
    """Adds the paths of unknown keys to `unknown`, with the keys that are known there, and a message for each
    unsupported key to `refused`."""
    for name, value in values.items():
        if name in keys.unsupported:
            nothing, why = keys.unsupported[name]
            if not any(_same(value, one) for one in nothing):
                refused.append(f"{path}{name} is {shown(value)}: {why}")
        elif name in keys.objects:
            if isinstance(value, Mapping):
                _sort(value, keys_of(keys.objects[name], value), f"{path}{name}.", unknown, refused)
            elif value is not None:
                refused.append(f"{path}{name} is {shown(value)}, wanted is an object")
        elif name not in keys.used and name not in keys.harmless:
            unknown[path + name] = keys


def _hinted(path: str, known: Keys) -> str:
    close = get_close_matches(path.rpartition(".")[2], sorted(known.names()), n=1, cutoff=0.75)
    return f"{path} (is it {close[0]}?)" if close else path


def _same(value: Any, other: Any) -> bool:
    """Whether two values are equal, without Python's True == 1."""
    return isinstance(value, bool) == isinstance(other, bool) and bool(value == other)


def shown(value: Any) -> str:
    """A value as JSON spells it, cut where it is long."""
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


GENERATING = "a setting of generating, for which generation_config.json is read"
NOTES = "says where the file comes from"
TRAINING = "only training depends on it"
RUNNING = "says how transformers runs the model, or what it returns, and changes no logits"
LABELS = "for classifiers"

# What transformers writes into any config.json (PreTrainedConfig of versions 4 and 5), besides what a family reads.
COMMON_HARMLESS: dict[str, str] = {
    **because(NOTES, "transformers_version architectures auto_map tokenizer_class"),
    **because(NOTES, "_name_or_path name_or_path _commit_hash custom_pipelines"),
    **because("the tensors are stored with their dtype", "dtype torch_dtype"),
    **because(RUNNING, "use_cache output_hidden_states output_attentions output_router_logits return_dict"),
    **because(RUNNING, "use_return_dict chunk_size_feed_forward torchscript attn_implementation pretraining_tp"),
    **because(RUNNING, "_attn_implementation _attn_implementation_autoset"),
    **because(RUNNING, "experts_implementation _experts_implementation"),
    **because(TRAINING, "attention_dropout hidden_dropout router_aux_loss_coef router_jitter_noise"),
    **because(LABELS, "id2label label2id num_labels problem_type finetuning_task"),
    **because(GENERATING, "task_specific_params sep_token_id decoder_start_token_id prefix do_sample temperature"),
    **because(GENERATING, "top_k top_p typical_p min_length max_length num_beams num_beam_groups early_stopping"),
    **because(GENERATING, "diversity_penalty length_penalty repetition_penalty encoder_repetition_penalty"),
    **because(GENERATING, "no_repeat_ngram_size encoder_no_repeat_ngram_size num_return_sequences bad_words_ids"),
    **because(GENERATING, "suppress_tokens begin_suppress_tokens forced_bos_token_id forced_eos_token_id"),
    **because(GENERATING, "remove_invalid_values epsilon_cutoff eta_cutoff exponential_decay_length_penalty"),
    **because(GENERATING, "output_scores return_dict_in_generate assistant_confidence_threshold"),
    **because(
        GENERATING, "num_assistant_tokens num_assistant_tokens_schedule assistant_lookbehind target_lookbehind"
    ),
}

DECODERS_ONLY = "only decoders that see nothing but the tokens before are built"
COMMON_UNSUPPORTED: dict[str, Unsupported] = {
    "is_encoder_decoder": ((False,), DECODERS_ONLY),
    "add_cross_attention": ((False,), DECODERS_ONLY),
    "is_causal": ((True,), DECODERS_ONLY),
    "pruned_heads": (({}, None), "heads that were pruned have tensors of other shapes"),
    "quantization": ((None,), "weights quantised by MLX cannot be read"),
}
