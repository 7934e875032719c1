"""The work that a target's hosts must do so that its devices never wait for images."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

from ml_collections import ConfigDict

from vit_jax.data.sampling import BlockShuffle
from vit_jax.errors import UserError

_STORED = {"imagenet2012": (147_897_477_120 / 1_281_167, 1_281_167 / 1024)}
"""Bytes per image (of the training archive), and images per file of TFDS's TFRecord build.

Files of an object store are read whole (`vit_jax.data.tfrecord`).
"""


@dataclasses.dataclass(frozen=True)
class Rate:
    """The images per second that one core of a host prepares, and the place of the measurement."""

    images_per_sec_per_core: float
    measured: str


@dataclasses.dataclass(frozen=True)
class Feeding:
    """The demands on the hosts at a target's least step time; zeros where that is not known.

    Attributes:
      cores: the number of cores of all hosts together.
      bytes_per_sec, requests_per_sec: the load of one host on an object store. If there are more
        hosts than parts of an epoch, several hosts read the same files.
    """

    images_per_sec: float
    num_hosts: int
    cores: float
    measured: str
    bytes_per_sec: float
    requests_per_sec: float

    @classmethod
    def of(
        cls, config: ConfigDict, images_per_sec: float, num_hosts: int, rate: Rate | None
    ) -> "Feeding":
        size, images_per_file = _STORED.get(config.data.name, (0.0, 1.0))
        read = images_per_sec / min(num_hosts, BlockShuffle(()).groups)
        return cls(
            images_per_sec=images_per_sec,
            num_hosts=num_hosts,
            cores=images_per_sec / rate.images_per_sec_per_core if rate else 0.0,
            measured=rate.measured if rate else "",
            bytes_per_sec=size * read,
            requests_per_sec=read / images_per_file if size else 0.0,
        )

    def rows(self) -> Iterator[tuple[str, str]]:
        """Returns rows for the table of a plan."""
        hosts = f"{self.num_hosts} host{'s' if self.num_hosts > 1 else ''}"
        yield "images to feed", f"{self.images_per_sec:,.0f}/s at the least step time, to {hosts}"
        if self.cores:
            each = self.cores / self.num_hosts
            yield "host cores", f"{self.cores:,.0f}, {each:,.0f} a host ({self.measured})"
        else:
            yield "host cores", "not known: --input=here measures, or the --json of a bench input"
        if self.bytes_per_sec:
            yield (
                "from an object store",
                f"{self.bytes_per_sec / 1e9:.2f} GB/s and {self.requests_per_sec:.2f} requests/s"
                " a host, whole files",
            )


def read_rate(path: str) -> Rate:
    """Returns the rate in a file that `bench input --json=FILE` wrote.

    Raises:
      UserError: the file cannot be read or has no rate.
    """
    try:
        measured = float(json.loads(Path(path).read_text())["images_per_sec_per_core"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"plan: --input={path} is no result of `bench input --json=FILE`"
            f" ({type(error).__name__}: {error}); or write --input=here"
        ) from error
    if not measured > 0:
        raise UserError(f"plan: --input={path} says {measured} images a second")
    return Rate(measured, f"{measured:,.0f} images/s a core, says {path}")
