"""Rotary embeddings as released configs spell them (`rope_parameters`), and back."""

from collections.abc import Mapping
from typing import Any

from kvell.errors import ConfigError
from kvell.layers.rotary import DefaultRotary, ProportionalRotary, YarnRotary

AnyRotary = DefaultRotary | ProportionalRotary | YarnRotary

KEYS = {
    "default": {"rope_type", "rope_theta", "partial_rotary_factor"},
    "proportional": {"rope_type", "rope_theta", "partial_rotary_factor"},
    "yarn": {
        "rope_type",
        "rope_theta",
        "partial_rotary_factor",
        "factor",
        "original_max_position_embeddings",
        "beta_fast",
        "beta_slow",
        "attention_factor",
    },
}


def read_rotary(values: Mapping[str, Any], where: str) -> AnyRotary:
    """One type's `rope_parameters`."""
    values = {key: value for key, value in values.items() if value is not None}
    kind = values.get("rope_type", "default")
    if kind not in KEYS:
        raise ConfigError(f"{where}: rope_type is {kind!r}, known are {', '.join(KEYS)}")
    if unknown := sorted(set(values) - KEYS[kind]):
        raise ConfigError(f"{where}: {unknown[0]} is not known for rope_type {kind}")
    needed = ["rope_theta"] + (["factor", "original_max_position_embeddings"] if kind == "yarn" else [])
    for name in needed:
        if name not in values:
            raise ConfigError(f"{where}: {name} is missing")
    common = {"theta": values["rope_theta"], "fraction": values.get("partial_rotary_factor", 1.0)}
    if kind == "default":
        return DefaultRotary(**common)
    if kind == "proportional":
        return ProportionalRotary(**common)
    return YarnRotary(
        **common,
        factor=values["factor"],
        original_positions=values["original_max_position_embeddings"],
        beta_fast=values.get("beta_fast", 32.0),
        beta_slow=values.get("beta_slow", 1.0),
        attention_factor=values.get("attention_factor"),
    )


def write_rotary(rotary: AnyRotary) -> dict[str, Any]:
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
