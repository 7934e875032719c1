"""Measures the training step of a named model on made-up images, in turns with other libraries.

Nothing here reads data, so it runs where TensorFlow is not installed.
"""

import contextlib
import dataclasses
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from vit_jax import models
from vit_jax.bench.machine import matmul_rate
from vit_jax.bench.rivals import Rival
from vit_jax.config import default_config
from vit_jax.data import Expected
from vit_jax.errors import UserError
from vit_jax.parallel import accelerators, sharding
from vit_jax.parallel.host_memory import fill_heap_gaps
from vit_jax.training.run import Run
from vit_jax.types import ArraySpec

NUM_CLASSES = 1000


@dataclasses.dataclass(frozen=True)
class Case:
    """The job that is measured: a model of `models.names()` on images of its own size, with AdamW.

    Attributes:
      dtype: the dtype of products; parameters and optimizer state are float32.
      fields: fields of our model that replace its own, such as `unroll` or `remat`.
    """

    model: str
    batch_size: int = 8
    dtype: str = "float32"
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def config(self) -> ConfigDict:
        """Returns our config: cross-entropy, AdamW, clipping by the global norm, as rivals do."""
        config = default_config()
        config.model = {"name": self.model, "dtype": self.dtype, **self.fields}
        config.task = {"name": "classification"}
        config.batch_size = self.batch_size
        config.total = "1000 steps"
        config.optim.clip_norm = 1.0
        return config

    @property
    def image_size(self) -> int:
        """Returns the side in pixels at which the model is listed.

        Raises:
          UserError: the model is not listed.
        """
        variant = models.find_variant(self.model)
        if variant.input_size is None or variant.num_classes is None:
            raise UserError(
                f"bench --model={self.model}: not a whole image model; "
                "`python -m vit_jax models` lists them"
            )
        return variant.input_size


class OurStep:
    """The compiled step of this package on one batch that stays on the device."""

    def __init__(self, case: Case):
        height = width = case.image_size
        image = ArraySpec((height, width, 3), np.dtype(np.uint8))
        label = ArraySpec((), np.dtype(np.int32))
        expected = Expected({"image": image, "label": label}, 1_000_000, NUM_CLASSES)
        run = Run.build(case.config(), source=expected)
        self.flops = run.train_flops_per_example() * case.batch_size
        self.num_devices = run.mesh.size
        started = time.perf_counter()
        self._step = run.compile_step()
        self.compile_seconds = time.perf_counter() - started
        self._state = run.make_state()
        fill_heap_gaps()
        rng = np.random.default_rng(0)
        batch = {
            "image": rng.integers(0, 256, (case.batch_size, height, width, 3), np.uint8),
            "label": rng.integers(0, NUM_CLASSES, case.batch_size, np.int32),
        }
        rows = sharding.local_rows(run.mesh, case.batch_size)
        self._batch = sharding.place(batch, rows, run.mesh, case.batch_size)
        self.seconds(1)

    def seconds(self, steps: int) -> float:
        """Returns the seconds that `steps` consecutive steps take."""
        started = time.perf_counter()
        for _ in range(steps):
            self._state, _ = self._step(self._state, self._batch)
        jax.block_until_ready(self._state)
        return time.perf_counter() - started


def bench_model(
    case: Case, against: Sequence[str], steps: int = 10, rounds: int = 5
) -> dict[str, float]:
    """Measures seconds per step, ours and each rival's in turns, and the machine's matmul rate.

    Args:
      against: names of `rivals.RIVALS`, with the folder of a checkout where one is needed.
      steps: training steps of each round. rounds: turns, over which medians are taken.

    Returns:
      Numbers with their units in the names. `matmul_fraction` is the share of the step that the
      model's own products would take at the measured rate of a large square product; `mfu` is
      their share of the chip's published peak, where that is known. A rival's `..._ratio` is the
      median over the rounds of its time over ours: above 1, ours is faster.

    Raises:
      UserError: there is no such model, or a rival has no such model or is not installed.
    """
    if against:  # The rivals need memory on the same device.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    own, rates = [], []
    with contextlib.ExitStack() as opened:
        rivals = []
        for name in against:
            rivals.append(Rival.of_step(name, case.model, case.batch_size, case.dtype))
            opened.callback(rivals[-1].close)
        theirs = {rival.name: [] for rival in rivals}
        ours = OurStep(case)
        for _ in range(rounds):
            own.append(ours.seconds(steps) / steps)
            for rival in rivals:
                theirs[rival.name].append(rival.seconds(steps) / steps)
            rates.append(matmul_rate(jnp.dtype(case.dtype)))
    seconds, rate = statistics.median(own), statistics.median(rates) * ours.num_devices
    found = {
        "step_seconds": seconds,
        "images_per_sec": case.batch_size / seconds,
        "compile_seconds": ours.compile_seconds,
        "matmul_gflops_per_sec": rate / 1e9,
        "matmul_fraction": ours.flops / seconds / rate,
        "num_devices": ours.num_devices,
    }
    chip = accelerators.of_kind(jax.devices()[0].device_kind)
    if chip:
        found["mfu"] = ours.flops / seconds / (chip.flops_per_device * ours.num_devices)
    for rival in rivals:
        key = rival.name.replace("-", "_")
        found[f"{key}_step_seconds"] = statistics.median(theirs[rival.name])
        found[f"{key}_compile_seconds"] = rival.ready_seconds
        found[f"{key}_ratio"] = statistics.median(
            a / b for a, b in zip(theirs[rival.name], own, strict=True)
        )
    return found
