"""Sizes as people write them: 128K tokens, 4K..1M, 24GiB."""

import re

from kvell.errors import InputError

TOKENS = {"": 1, "K": 1 << 10, "M": 1 << 20}
BYTES = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
BYTES |= {unit.removesuffix("B"): factor for unit, factor in BYTES.items() if unit.endswith("B")}
BYTES |= {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
# A memory of fewer bytes holds no model: whoever writes so small a number means another unit.
LEAST_BYTES = 1 << 20
UNITS = ("B", "kB", "MB", "GB", "TB")


def tokens(text: str, what: str = "context") -> int:
    """4096, 128K (131,072) or 1M (1,048,576)."""
    return _size(text, TOKENS, what, "4096, 128K or 1M")


def contexts(text: str) -> list[int]:
    """One context, or 4K..1M: each twice the one before, up to the end and with it."""
    first, dots, last = text.partition("..")
    lengths = [tokens(first)]
    if dots:
        end = tokens(last)
        if end < lengths[0]:
            raise InputError(f"context {text}: the range ends before it begins")
        while 2 * lengths[-1] <= end:
            lengths.append(2 * lengths[-1])
        if lengths[-1] != end:
            lengths.append(end)
    return lengths


def memory(text: str) -> int:
    """24GiB (2^30 each), 24GB or 24G (10^9 each), or bytes, which are a mebibyte at least: 24 means another unit."""
    size = _size(text, BYTES, "memory", "24GiB, 24GB or a number of bytes")
    if size < LEAST_BYTES and not text.strip()[-1].isalpha():
        raise InputError(
            f"memory {text.strip()} would be {size:,} bytes: write {text.strip()}GB or {text.strip()}GiB"
        )
    return size


def _size(text: str, units: dict[str, int], what: str, examples: str) -> int:
    known = {unit.lower(): factor for unit, factor in units.items()}
    found = re.fullmatch(r"(-?\d+(?:\.\d+)?)\s*([a-zA-Z]*)", text.strip())
    if found is None or found[2].lower() not in known:
        raise InputError(f"{what} {text!r} is no size: write {examples}")
    size = round(float(found[1]) * known[found[2].lower()])
    if size < 1:
        raise InputError(f"{what} must be at least 1, not {text}")
    return size


def tokens_text(count: int) -> str:
    """131072 as 128K where nothing is lost."""
    for unit in ("M", "K"):
        if count >= TOKENS[unit] and count % TOKENS[unit] == 0:
            return f"{count // TOKENS[unit]}{unit}"
    return f"{count:,}"


def bytes_text(count: float) -> str:
    """Four digits: 811.6 MB, 5.432 GB."""
    size = float(count)
    for unit in UNITS:
        if size < 1000 or unit == UNITS[-1]:
            return f"{_digits(size, unit != 'B')} {unit}"
        size /= 1000
    raise AssertionError


def flops_text(count: float) -> str:
    """Four digits: 19.71 G, 4.418 P."""
    size = float(count)
    for unit in ("", "k", "M", "G", "T", "P"):
        if size < 1000:
            return f"{_digits(size, bool(unit))} {unit}".rstrip()
        size /= 1000
    return f"{_digits(size, True)} E"


def seconds_text(seconds: float) -> str:
    """Three digits: 1.93 ms, 4.47 s."""
    for factor, unit in ((1, "s"), (1e3, "ms"), (1e6, "us")):
        if seconds * factor >= 1 or unit == "us":
            return f"{seconds * factor:.3g} {unit}"
    raise AssertionError


def _digits(size: float, fractional: bool) -> str:
    if not fractional:
        return f"{size:.4g}"
    return f"{size:.{3 if size < 10 else 2 if size < 100 else 1}f}"
