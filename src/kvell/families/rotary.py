"""Rotary embeddings as released configs spell them (`rope_parameters`), and back."""

import math
from collections.abc import Mapping
from typing import Any

from kvell.errors import ConfigError
from kvell.families.keys import Keys, KeysOf, Unsupported, keys_of
from kvell.families.released import REQUIRED, Released
from kvell.layers.contract import RotaryPart
from kvell.layers.rotary import DefaultRotary, ProportionalRotary, YarnRotary

KINDS = {"default": "default", "proportional": "proportional", "yarn": "yarn"}
PLAIN = frozenset({"rope_type", "type", "rope_theta", "partial_rotary_factor"})
YARN = frozenset({"factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor"})
ATTENTION_FACTOR = frozenset({"mscale", "mscale_all_dim"})
SCALING = YARN | ATTENTION_FACTOR | {"truncate"}
# Within a set transformers does not look for it, where other engines do.
TRUNCATE: dict[str, Unsupported] = {
    "truncate": ((True, None), "pairs between the fast and the slow ones are counted in whole pairs")
}


def rotary_keys(values: Mapping[str, Any]) -> Keys:
    """The keys of one set, which depend on its type."""
    kind = values.get("rope_type", values.get("type", "default"))
    if kind == "yarn":
        return Keys(used=PLAIN | YARN | ATTENTION_FACTOR, unsupported=TRUNCATE)
    if kind == "proportional":
        scaled: dict[str, Unsupported] = {"factor": ((1,), "proportional rotary embeddings are not scaled")}
        return Keys(used=PLAIN, harmless=dict.fromkeys(SCALING - {"factor"}, "only of yarn"), unsupported=scaled)
    if "rope_type" in values or "type" in values:
        return Keys(used=PLAIN, harmless=dict.fromkeys(SCALING, "only of yarn"))
    why = "without a rope_type, which would be default, nothing is scaled"
    return Keys(used=PLAIN, unsupported=dict.fromkeys(SCALING, ((None,), why)))


def rotary_sets(*types: str, set_keys: KeysOf = rotary_keys) -> KeysOf:
    """The keys of `rope_parameters` with a set for each of these layer types."""

    def keys(values: Mapping[str, Any]) -> Keys:
        if not set(types) & set(values):
            return keys_of(set_keys, values)
        strays = ("rope_type", "type", "original_max_position_embeddings")
        return Keys(
            harmless=dict.fromkeys(strays, "a stray, beside the sets that have their own"),
            unsupported=TRUNCATE,
            objects=dict.fromkeys(types, set_keys),
        )

    return keys


def read_rotary_sets(text: Released, default: Mapping[str, Any]) -> tuple[Released, dict[str, Any]]:
    """The object `rope_parameters` of a config, and the `theta` and `fraction` that the keys at the top give to sets
    that do not state them."""
    if text.has("rope_theta") and not text.has("rope_parameters"):
        raise text.error("rope_theta stands alone: rope_parameters, by layer type, are wanted instead")
    sets = text.within("rope_parameters", text.mapping("rope_parameters", default, null=default))
    defaults = {"fraction": text.number("partial_rotary_factor", 1.0, most=1, null=1.0)}
    if text.has("rope_theta"):
        defaults["theta"] = text.number("rope_theta", above=1)
    return sets, defaults


def read_rotary(
    text: Released, theta: Any = REQUIRED, fraction: float = 1.0, attention_factor: float | None = None
) -> dict[str, Any]:
    """One set as the fields of a rotary part; `theta`, `fraction` and `attention_factor` are the defaults."""
    kind = text.choice("rope_type", text.values.get("type", "default"), KINDS)
    if "type" in text.values and text.choice("type", REQUIRED, KINDS) != kind:
        raise text.error(f"{text.path}type is {text.values['type']!r}, and rope_type is {kind!r}")
    fields = {
        "kind": kind,
        "theta": text.number("rope_theta", theta, above=1),
        "fraction": text.number("partial_rotary_factor", fraction, most=1),
    }
    if kind != "yarn":
        return fields
    factor = text.number("factor", least=1)
    return fields | {
        "factor": factor,
        "original_positions": text.tokens("original_max_position_embeddings"),
        "beta_fast": text.number("beta_fast", 32.0, null=32.0),
        "beta_slow": text.number("beta_slow", 1.0, null=1.0),
        "attention_factor": _attention_factor(text, factor, attention_factor),
    }


def _attention_factor(text: Released, factor: float, default: float | None) -> float | None:
    """The factor as stated, or as the ratio of two (`mscale`, `mscale_all_dim`) in DeepSeek's files; None stands for
    the paper's."""
    stated = text.number("attention_factor", default, null=None)
    scale, all_dimensions = (text.number(name, None, least=0, null=None) for name in ("mscale", "mscale_all_dim"))
    if stated is not None or not scale or not all_dimensions:
        return stated
    return (0.1 * scale * math.log(factor) + 1.0) / (0.1 * all_dimensions * math.log(factor) + 1.0)


def write_rotary(rotary: RotaryPart) -> dict[str, Any]:
    if not isinstance(rotary, DefaultRotary | ProportionalRotary | YarnRotary):
        raise ConfigError(f"there is no released spelling for {rotary.kind} rotary embeddings")
    values: dict[str, Any] = {"rope_type": rotary.kind, "rope_theta": rotary.theta}
    if rotary.fraction != 1.0:
        values["partial_rotary_factor"] = rotary.fraction
    if isinstance(rotary, YarnRotary):
        values |= {
            "factor": rotary.factor,
            "original_max_position_embeddings": rotary.original_positions,
            "beta_fast": rotary.beta_fast,
            "beta_slow": rotary.beta_slow,
        }
        if rotary.attention_factor is not None:
            values["attention_factor"] = rotary.attention_factor
    return values
