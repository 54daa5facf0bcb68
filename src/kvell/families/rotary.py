"""Rotary embeddings as released configs spell them (`rope_parameters`), and back."""

from collections.abc import Mapping
from typing import Any

from kvell.errors import ConfigError
from kvell.layers.rotary import AnyRotary, YarnRotary

FIELDS = {
    "rope_theta": "theta",
    "partial_rotary_factor": "fraction",
    "factor": "factor",
    "original_max_position_embeddings": "original_positions",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "attention_factor": "attention_factor",
}
PLAIN = {"rope_type", "rope_theta", "partial_rotary_factor"}
KEYS = {"default": PLAIN, "proportional": PLAIN, "yarn": {"rope_type", *FIELDS}}


def read_rotary(released: Any, where: str) -> dict[str, Any]:
    """One type's `rope_parameters` as a rotary part's fields."""
    if not isinstance(released, Mapping):
        raise ConfigError(f"{where} is {released!r}, wanted is an object")
    values = {key: value for key, value in released.items() if value is not None}
    kind = values.get("rope_type", "default")
    if not isinstance(kind, str) or kind not in KEYS:
        raise ConfigError(f"{where}: rope_type is {kind!r}, known are {', '.join(KEYS)}")
    if unknown := sorted(set(values) - KEYS[kind]):
        raise ConfigError(f"{where}: {unknown[0]} is not known for rope_type {kind}")
    needed = ["rope_theta"] + (["factor", "original_max_position_embeddings"] if kind == "yarn" else [])
    for name in needed:
        if name not in values:
            raise ConfigError(f"{where}: {name} is missing")
    return {"kind": kind} | {FIELDS[key]: value for key, value in values.items() if key in FIELDS}


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
