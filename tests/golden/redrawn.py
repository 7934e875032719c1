"""Arrays of random numbers that a file keeps as the way they were drawn.

An input that NumPy drew from a seed need not be stored: the same draw gives the same bits. A file
says so in its entry `@drawn`, JSON of one `Draw` for each such array, by name. The checksum of
each array is kept too, so an array with other bits is never compared with.
"""

import dataclasses
import functools
import json
import zlib
from collections.abc import Mapping

import numpy as np

ENTRY = "@drawn"
GENERATORS = {"RandomState": np.random.RandomState, "default_rng": np.random.default_rng}


@dataclasses.dataclass(frozen=True)
class Draw:
    """The way to draw an array of float32: numbers of a generator, times `scale`, plus `shift`.

    method: "standard_normal", or "random" for uniform numbers from 0 to 1.
    pieces: (first, count) of consecutive numbers of the generator, which the array holds in turn.
    rounding: where float64 becomes float32: "float64" after all arithmetic, "float32" before it,
        "divided" also before it, with a division by `scale` in place of the product.
    """

    generator: str
    seed: int
    method: str
    pieces: tuple[tuple[int, int], ...]
    rounding: str
    scale: float
    shift: float
    shape: tuple[int, ...]
    crc32: int

    def array(self) -> np.ndarray:
        """Draws the array. Raises ValueError where the bits are not those of the recording."""
        end = max(first + count for first, count in self.pieces)
        numbers = _numbers(self.generator, self.seed, self.method, -(-end // 2**16) * 2**16)
        drawn = np.concatenate([numbers[first : first + count] for first, count in self.pieces])
        drawn = self._scaled(drawn).reshape(self.shape)
        if zlib.crc32(drawn.tobytes()) != self.crc32:
            raise ValueError(f"this NumPy draws other numbers: {self}")
        return drawn

    def _scaled(self, numbers: np.ndarray) -> np.ndarray:
        if self.rounding == "float64":
            return (self.shift + self.scale * numbers).astype(np.float32)
        numbers, scale = numbers.astype(np.float32), np.float32(self.scale)
        scaled = numbers / scale if self.rounding == "divided" else numbers * scale
        return scaled + np.float32(self.shift)


@functools.lru_cache(maxsize=4)
def _numbers(generator: str, seed: int, method: str, count: int) -> np.ndarray:
    return getattr(GENERATORS[generator](seed), method)(count)


def entry(draws: Mapping[str, Draw]) -> np.ndarray:
    """The entry of a file that holds `draws`."""
    text = json.dumps({name: dataclasses.asdict(draw) for name, draw in draws.items()})
    return np.frombuffer(text.encode(), np.uint8)


def whole(stored: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays of a file, with those that it keeps as draws."""
    arrays = {name: array for name, array in stored.items() if name != ENTRY}
    if ENTRY in stored:
        for name, draw in json.loads(stored[ENTRY].tobytes()).items():
            arrays[name] = Draw(**draw).array()
    return arrays
