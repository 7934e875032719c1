"""Measures the training step of a named model on made-up images, in turns with other libraries.

Nothing here reads data, so it runs where TensorFlow is not installed.
"""

import contextlib
import dataclasses
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from vit_jax import data, models
from vit_jax.bench.machine import matmul_rate
from vit_jax.bench.rivals import Rival
from vit_jax.config import default_config
from vit_jax.errors import UserError
from vit_jax.parallel import accelerators, sharding
from vit_jax.parallel.host_memory import tidy_heap
from vit_jax.training.run import Run


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
        config.data.pp = f"decode_jpeg_and_inception_crop({self.image_size})"
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
                "the command `models` lists them"
            )
        return variant.input_size


class OurStep:
    """The compiled step of a config on one batch of random images that stays on the device.

    Attributes:
      flops: the model FLOPs of a step, as `plan` counts them.
      device_bytes: the memory that a device needs for the step, as the compiler plans it.
      state_bytes: the part of it that parameters and the optimizer's state take.
    """

    def __init__(self, config: ConfigDict):
        run = Run.build(config, source=data.expect(config.data))
        self.batch_size = config.batch_size
        self.flops = run.train_flops_per_example() * config.batch_size
        self.num_devices = run.mesh.size
        started = time.perf_counter()
        self._step = run.compile_step()
        self.compile_seconds = time.perf_counter() - started
        memory = self._step.memory_analysis()
        assert memory is not None
        in_and_out = memory.argument_size_in_bytes + memory.output_size_in_bytes
        self.device_bytes = in_and_out - memory.alias_size_in_bytes + memory.temp_size_in_bytes
        self.state_bytes = sharding.bytes_per_device(run.abstract)
        self._state = run.make_state()
        tidy_heap()
        rng = np.random.default_rng(0)
        batch = {
            name: rng.integers(
                0,
                256 if spec.dtype == np.uint8 else run.source.num_classes,
                (config.batch_size, *spec.shape),
                spec.dtype,
            )
            for name, spec in run.task.info.spec.items()
        }
        rows = sharding.local_rows(run.mesh, config.batch_size)
        self._batch = sharding.place(batch, rows, run.mesh, config.batch_size)
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
      Those of `figures`, and more with their units in the names. A rival's `..._ratio` is the
      median over the rounds of its time over ours: above 1, ours is faster.

    Raises:
      UserError: there is no such model, or a rival has no such model or is not installed.
    """
    if against:  # The rivals need memory on the same device.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    with contextlib.ExitStack() as opened:
        rivals = []
        for name in against:
            rivals.append(Rival.of_step(name, case.model, case.batch_size, case.dtype))
            opened.callback(rivals[-1].close)
        ours = OurStep(case.config())
        timed = {"": ours.seconds, **{rival.name: rival.seconds for rival in rivals}}
        seconds, rate = in_turns(timed, steps, rounds, case.dtype)
    found = {
        **figures(ours, statistics.median(seconds[""]), rate),
        "matmul_gflops_per_sec": rate * ours.num_devices / 1e9,
        "num_devices": ours.num_devices,
    }
    for rival in rivals:
        key = rival.name.replace("-", "_")
        found[f"{key}_step_seconds"] = statistics.median(seconds[rival.name])
        found[f"{key}_compile_seconds"] = rival.ready_seconds
        found[f"{key}_ratio"] = ratio(seconds[rival.name], seconds[""])
    return found


def in_turns(
    timed: Mapping[str, Callable[[int], float]], steps: int, rounds: int, dtype: str
) -> tuple[dict[str, list[float]], float]:
    """Runs several programs in turns, and after each turn a large product of matrices in `dtype`.

    timed: by its name, a function that runs so many steps of a program and returns the seconds.

    Returns:
      The seconds per step of each program in each round, and the median rate of the product on one
      device in FLOP/s.
    """
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    rates = []
    for _ in range(rounds):
        for name, seconds_for in timed.items():
            seconds[name].append(seconds_for(steps) / steps)
        rates.append(matmul_rate(jnp.dtype(dtype)))
    return seconds, statistics.median(rates)


def ratio(theirs: Sequence[float], ours: Sequence[float]) -> float:
    """Returns the median over the rounds of their time over ours."""
    return statistics.median(a / b for a, b in zip(theirs, ours, strict=True))


def figures(step: OurStep, seconds: float, rate: float) -> dict[str, float]:
    """Returns the figures of a step that takes so many seconds.

    `matmul_fraction` is the share of the step that the model's own products would take at `rate`,
    the FLOP/s of a large product on one device. `mfu` is their share of the chip's published peak,
    where that is known.
    """
    found = {
        "step_seconds": seconds,
        "images_per_sec": step.batch_size / seconds,
        "compile_seconds": step.compile_seconds,
        "device_bytes": step.device_bytes,
        "matmul_fraction": step.flops / seconds / (rate * step.num_devices),
    }
    chip = accelerators.of_kind(jax.devices()[0].device_kind)
    if chip:
        found["mfu"] = step.flops / seconds / (chip.flops_per_device * step.num_devices)
    return found
