"""Lengths of time in a config, in steps, epochs, examples or percent, as whole steps."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

from ml_collections import ConfigDict

from vit_jax.errors import UserError, quoted

# At most 18 digits, and exponents to 18: longer numbers count no steps, and take time to compute.
_DURATION = re.compile(
    r"\s*(\d[\d_]{0,17}(?:\.\d{1,18})?(?:e\d|e1[0-8])?|\.\d{1,18})\s*([a-z%]*)\s*"
)
_UNITS = {
    "": "steps", "step": "steps", "steps": "steps", "ep": "epochs", "epoch": "epochs",
    "epochs": "epochs", "example": "examples", "examples": "examples", "%": "percent",
    "percent": "percent",
}  # fmt: skip


def parse_duration(value: int | str, name: str = "duration") -> tuple[Fraction, str]:
    """Returns `"90 epochs"` as `(90, "epochs")`, exactly; a plain int counts steps.

    Raises:
      UserError: no number, or an unknown unit.
    """
    match = _DURATION.fullmatch(str(value)) if isinstance(value, int | str) else None
    if isinstance(value, bool) or not match or match[2] not in _UNITS:
        raise UserError(
            f"config.{name}={quoted(value)} is no duration; write steps as a number, or a text such"
            " as '90 epochs', '1000 examples', '5 percent'"
        )
    return Fraction(match[1].replace("_", "")), _UNITS[match[2]]


@dataclass(frozen=True)
class Duration:
    """Turns durations into whole steps, at least 1 unless zero: the nearest, percentages up.

    Called with an int or text. The arithmetic is exact: 1.1 percent of 100,000 steps is 1,100.

    Attributes:
      total: length of training in steps.
    """

    total: int
    batch_size: int
    num_examples: int

    def __call__(self, value: int | str, name: str = "duration") -> int:
        amount, unit = parse_duration(value, name)
        steps: Mapping[str, Fraction] = {
            "steps": amount,
            "epochs": amount * self.num_examples / self.batch_size,
            "examples": amount / self.batch_size,
            # Up: what is done every 25 percent is done four times, not once more at the very end.
            "percent": Fraction(math.ceil(amount * self.total / 100)),
        }
        return max(1, round(steps[unit])) if amount else 0


def durations(config: ConfigDict, num_examples: int) -> Duration:
    """Returns the clock of a run: `config.total` against a training split of `num_examples`.

    Raises:
      UserError: `config.total` is a percentage.
    """
    _, unit = parse_duration(config.total, "total")
    if unit == "percent":
        raise UserError(f"config.total={config.total!r} cannot be a percentage of itself")
    total = Duration(0, config.batch_size, num_examples)(config.total, "total")
    return Duration(total, config.batch_size, num_examples)


def is_due(at: int, every: int, total: int) -> bool:
    """Returns whether something is due after step `at`; if `every` is 0, only after the last."""
    return at == total or (every > 0 and at % every == 0)
