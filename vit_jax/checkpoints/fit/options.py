"""The choices of a caller who fits a checkpoint to a model."""

import dataclasses
import re
from collections.abc import Sequence

from vit_jax.checkpoints.fit import surgery
from vit_jax.errors import UserError, nearest

HEADS = ("auto", "keep", "zero")


@dataclasses.dataclass(frozen=True)
class Options:
    """Options for fitting a checkpoint to a model; see `checkpoints.load`."""

    head: str = "auto"
    interpolation: str = "auto"
    source_grid: surgery.Grid | None = None
    initialise: Sequence[str] = ()
    ignore: Sequence[str] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        if self.head not in HEADS:
            raise UserError(f"head={self.head!r} is not known; {nearest(self.head, HEADS)}")
        if self.source_grid is not None and not (
            len(self.source_grid) == 2 and all(type(n) is int and n > 0 for n in self.source_grid)
        ):
            given = list(self.source_grid)
            raise UserError(f"source_grid={given}: write two whole numbers, rows and columns")
        for pattern in (*self.initialise, *self.ignore):
            try:
                re.compile(pattern)
            except re.error as error:
                raise UserError(f"{pattern!r} is no regular expression: {error}") from error


def any_match(patterns: Sequence[str], name: str) -> bool:
    """Returns whether one of the patterns matches the whole name."""
    return any(re.fullmatch(pattern, name) for pattern in patterns)
