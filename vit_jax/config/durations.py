"""Lengths of time in a config, in steps, epochs, examples or percent, as whole steps."""

import math
import re
from dataclasses import dataclass

from ml_collections import ConfigDict

from vit_jax.errors import UserError

_DURATION = re.compile(r"^\s*(\d[\d_]*(?:\.\d+)?(?:e\d+)?|\.\d+)\s*([a-z%]*)\s*$")
_UNITS = {
    "": "steps", "step": "steps", "steps": "steps", "ep": "epochs", "epoch": "epochs",
    "epochs": "epochs", "example": "examples", "examples": "examples", "%": "percent",
    "percent": "percent",
}  # fmt: skip


def parse_duration(value: int | str, name: str = "duration") -> tuple[float, str]:
    """`"90 epochs"` → `(90.0, "epochs")`; a plain int counts steps.

    Raises:
      UserError: no number, or an unknown unit.
    """
    match = _DURATION.match(str(value)) if isinstance(value, int | str) else None
    if isinstance(value, bool) or not match or match[2] not in _UNITS:
        raise UserError(
            f"config.{name}={value!r} is no duration; write steps as a number, or a string such as"
            " '90 epochs', '1000 examples', '5 percent'"
        )
    return float(match[1].replace("_", "")), _UNITS[match[2]]


@dataclass(frozen=True)
class Duration:
    """Turns durations into whole steps, at least 1 unless zero: the nearest, percentages up.

    Called with an int or string. `total` is the length of training in steps.
    """

    total: int
    batch_size: int
    num_examples: int

    def __call__(self, value: int | str, name: str = "duration") -> int:
        amount, unit = parse_duration(value, name)
        steps = {
            "steps": amount,
            "epochs": amount * self.num_examples / self.batch_size,
            "examples": amount / self.batch_size,
            # Up: what is done every 25 percent is done four times, not once more at the very end.
            "percent": math.ceil(amount * self.total / 100),
        }[unit]
        return max(1, round(steps)) if amount else 0


def durations(config: ConfigDict, num_examples: int) -> Duration:
    """The run's clock: `config.total` against a training split of `num_examples`."""
    _, unit = parse_duration(config.total, "total")
    if unit == "percent":
        raise UserError(f"config.total={config.total!r} cannot be a percentage of itself")
    total = Duration(0, config.batch_size, num_examples)(config.total, "total")
    return Duration(total, config.batch_size, num_examples)
