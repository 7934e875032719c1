"""Fetching batches of records, and what to do about those that cannot be read or decoded."""

import logging
import threading
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from vit_jax.data.sampling import replacement
from vit_jax.data.sources import Records, Source
from vit_jax.errors import UserError

_MAX_ATTEMPTS = 20
_MAX_DESCRIPTIONS = 100
# Positions whose bad records are remembered: far more than the batches that are being made hold.
_MAX_POSITIONS = 100_000

logger = logging.getLogger(__name__)


class RawBatch(NamedTuple):
    """The records of one batch as their source holds them, on the way to preprocessing."""

    records: Records
    indices: np.ndarray
    """Record numbers, int64 [k]."""
    positions: np.ndarray
    """Stream positions, int64 [k]."""
    seeds: np.ndarray
    """Augmentation keys, int32 [k, 2]."""
    mask: np.ndarray | None
    """Evaluation only: float32 [k], 0 for padding."""


class Feed(NamedTuple):
    """The batches to load, and their order."""

    load: Callable[[int], RawBatch]
    """Reads the batch of a step. Called from several threads."""
    steps: range
    num_rows: int
    """Rows of each batch that this process holds."""


class RecordReader:
    """Reads records of a source; keeps the account of bad ones.

    With `skip`, a bad record gives its place to another, drawn as a pure function of its stream
    position, so that every process and every restart puts the same one there. With `fail` (and
    always in evaluation) it is an error that names the record.
    """

    def __init__(self, source: Source, *, seed: int = 0, skip_bad: bool = False):
        self.source = source
        self._seed = seed
        self.skip_bad = skip_bad
        self._lock = threading.Lock()
        self._attempts: dict[int, int] = {}
        self.bad_images: list[str] = []
        self.num_bad_images = 0

    def read(self, indices: np.ndarray, positions: np.ndarray) -> tuple[Records, np.ndarray]:
        """The records `indices`, and the record numbers actually used (int64 [k])."""
        if self._attempts:
            indices = indices.copy()
            for row, position in enumerate(positions.tolist()):
                if attempt := self._attempts.get(position):
                    indices[row] = self._replacement(position, attempt)
        try:
            return self.source.fetch(indices), indices
        except UserError:
            raise
        except Exception as error:
            logger.debug("batch read failed, reading its records singly: %s", error)
            return self._read_singly(indices, positions)

    def report_bad(self, index: int, position: int, reason: str) -> int:
        """Takes note of a bad record; returns the record that takes its place.

        Raises:
            UserError: bad records are not to be skipped, or too many were bad at this position.
        """
        description = f"{self.source.describe(index)}: {reason}"
        if not self.skip_bad:
            raise UserError(
                f"bad image {description} (in training, data.on_bad_image='skip' passes over it)"
            )
        with self._lock:
            attempt = self._attempts[position] = self._attempts.pop(position, 0) + 1
            if len(self._attempts) > _MAX_POSITIONS:
                del self._attempts[next(iter(self._attempts))]
            if attempt > _MAX_ATTEMPTS:
                raise UserError(
                    f"{attempt} images in a row cannot be used, the last is {description}"
                )
            self.num_bad_images += 1
            if len(self.bad_images) < _MAX_DESCRIPTIONS:
                self.bad_images.append(description)
        logger.warning("skipped bad image %s", description)
        return self._replacement(position, attempt)

    def _replacement(self, position: int, attempt: int) -> int:
        return replacement(position, attempt, len(self.source), self._seed)

    def _read_singly(
        self, indices: np.ndarray, positions: np.ndarray
    ) -> tuple[Records, np.ndarray]:
        singles, used = [], []
        for index, position in zip(indices.tolist(), positions.tolist(), strict=True):
            current = index
            while True:
                try:
                    singles.append(self.source.fetch(np.array([current])))
                    break
                except UserError:
                    raise
                except Exception as error:
                    reason = f"{type(error).__name__}: {error}"
                    current = self.report_bad(current, position, reason)
            used.append(current)
        records = {key: np.concatenate([one[key] for one in singles]) for key in singles[0]}
        return records, np.array(used, np.int64)


def sample_record(source: Source) -> Records:
    """A batch of one readable record, to learn the fields, shapes and dtypes of a source."""
    for index in range(min(_MAX_ATTEMPTS, len(source))):
        try:
            return source.fetch(np.array([index]))
        except UserError:
            raise
        except Exception as error:
            last = f"{source.describe(index)}: {type(error).__name__}: {error}"
    raise UserError(f"none of the first images can be read, the last tried is {last}")


def mask_padding(batch: Records, mask: np.ndarray | None) -> Records:
    """Zeroes the rows that are padding and adds `mask`; nothing where there is no mask."""
    if mask is None:
        return batch
    if not mask.all():
        batch = {key: x.copy() for key, x in batch.items()}
        for x in batch.values():
            x[mask == 0] = 0
    return batch | {"mask": mask}
