"""Distributions of a random search, e.g. `log_uniform(1e-4, 1e-1)`, and their draws. Imports no torch."""

import difflib
import hashlib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

EXAMPLES = {
    "uniform": "uniform(0, 0.5)",
    "log_uniform": "log_uniform(1e-4, 1e-1)",
    "integers": "integers(2, 8)",
    "choice": "choice(sgd, adamw)",
}
"""Name of each distribution -> an example. `integers` includes both bounds."""

_CALL = re.compile(r"\s*(\w+)\s*\((.*)\)\s*", re.DOTALL)
_MAX_INTEGER = 2**53  # larger ones are not exact as floating-point numbers


@dataclass(frozen=True)
class Distribution:
    """The values that one setting may take in a random search."""

    name: str
    bounds: tuple[float, float] = (0.0, 0.0)
    choices: tuple[str, ...] = ()

    def draw(self, *key: object) -> str:
        """Return the value for a key, as text; the same on every machine.

        Numbers have four significant digits: run folders get short names, and machines whose `exp` differs in the last
        bit still agree.
        """
        fraction = _fraction(*key)
        low, high = self.bounds
        if self.name == "choice":
            return self.choices[int(fraction * len(self.choices))]
        if self.name == "integers":
            return str(int(low) + int(fraction * (high - low + 1)))
        if self.name == "log_uniform":
            value = math.exp(math.log(low) + fraction * (math.log(high) - math.log(low)))
        else:
            value = low + fraction * (high - low)
        return repr(min(high, max(low, float(f"{value:.4g}"))))


def _fraction(*key: object) -> float:
    """Return a number uniform in [0, 1) that depends only on the key."""
    digest = hashlib.sha256("\0".join(map(str, key)).encode()).digest()
    return (int.from_bytes(digest[:8]) >> 11) * 2.0**-53


def parse_distribution(text: str) -> Distribution | None:
    """Return the distribution that a text describes; None if it does not look like one.

    Raises:
        ValueError: there is no such distribution, or its arguments are invalid. The message has the remedy.
    """
    if not (call := _CALL.fullmatch(text)):
        return None
    name, arguments = call[1], split_at_commas(call[2])
    if name not in EXAMPLES:
        close = difflib.get_close_matches(name, EXAMPLES, n=1, cutoff=0.75)
        meant = f"did you mean {close[0]}?" if close else f"choose one of {', '.join(EXAMPLES)}"
        raise ValueError(f"there is no distribution {name}; {meant}")
    if name == "choice":
        if not arguments or len(set(arguments)) < len(arguments):
            raise ValueError(f"should have different values, e.g. {EXAMPLES[name]}")
        return Distribution(name, choices=tuple(arguments))
    return Distribution(name, bounds=_bounds(name, arguments))


def _bounds(name: str, arguments: Sequence[str]) -> tuple[float, float]:
    try:
        low, high = (float(argument) for argument in arguments)
    except ValueError:
        raise ValueError(f"should have two numbers, e.g. {EXAMPLES[name]}") from None
    if not (math.isfinite(low) and math.isfinite(high) and low < high and math.isfinite(high - low)):
        raise ValueError("should have two finite bounds, the lower one first")
    if name == "log_uniform" and low <= 0:
        raise ValueError("should have bounds above 0; use uniform for others")
    if name == "integers" and not (low.is_integer() and high.is_integer() and max(-low, high) <= _MAX_INTEGER):
        raise ValueError(f"should have whole numbers as bounds, at most 2**53; e.g. {EXAMPLES[name]}")
    return low, high


def split_at_commas(text: str) -> list[str]:
    """Split a text at its commas, except those inside brackets; empty parts are dropped."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth <= 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts if part.strip()]
