"""The parts of a run, built from its config: mesh, source, task, optimizer and compiled step."""

import dataclasses
import logging
import math
import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vit_jax import data, models, optim, tasks
from vit_jax.config.durations import Duration, durations
from vit_jax.errors import UserError
from vit_jax.models.published import teacher_of
from vit_jax.parallel import compiler_flags, sharding
from vit_jax.training import step
from vit_jax.training.feed import DeviceFeed, Feedable
from vit_jax.training.spikes import SpikeGuard
from vit_jax.types import Array, ArraySpec, Batch, DataInfo, HostBatch, Params

logger = logging.getLogger(__name__)

TrainStep = Callable[[step.State, Batch], tuple[step.State, dict[str, Array]]]


@dataclasses.dataclass
class Run:
    """The parts of a run that do not change from step to step.

    Attributes:
      make_state: makes the initial state, on the devices.
      abstract: the shapes and shardings of the state.
      grad_shardings: the shardings of gradients and updates; with `mesh.zero1` these are the
        shardings of the optimizer's state.
      start: the step after which the settings hold, which is not 0 for a later stage of a run.
    """

    config: ConfigDict
    mesh: Mesh
    source: data.Source | data.Expected
    task: tasks.BaseTask
    optimizer: optim.Optimizer
    duration: Duration
    make_state: Callable[[], step.State]
    abstract: step.State
    grad_shardings: Params
    start: int = 0

    @classmethod
    def build(
        cls,
        config: ConfigDict,
        devices: Sequence[jax.Device] | None = None,
        source: data.Expected | None = None,
    ) -> "Run":
        """Builds the parts, which finds every mistake in a config before anything is computed.

        Args:
          devices: the devices of the mesh; None for all devices.
          source: a substitute for the source that `config.data` names.

        Raises:
          UserError: a part of the config does not fit; the message says what to write instead.
        """
        mesh = sharding.make_mesh(config.mesh, devices)
        sharding.check_batch_size(mesh, config.batch_size, config.accum_steps)
        given: data.Source | data.Expected
        spec: Mapping[str, ArraySpec]
        if source is None:
            given = open_source(config.data)
            spec = data.element_spec(given, config.data.pp)
        else:
            given, spec = source, source.spec
        given = data.balanced(given, config.data.balance, config.seed)
        return cls._of(config, mesh, given, spec)

    def with_settings(self, config: ConfigDict) -> "Run":
        """Returns the run of a config that differs in keys that a stage may set.

        It has the same devices and reads the same source.

        Raises:
          UserError: a part of the config does not fit.
        """
        sharding.check_batch_size(self.mesh, config.batch_size, config.accum_steps)
        return self._of(config, self.mesh, self.source, self._spec_with(config))

    def _spec_with(self, config: ConfigDict) -> Mapping[str, ArraySpec]:
        """Returns the arrays of an example that the preprocessing of `config` makes."""
        source = self.source
        if isinstance(source, data.Expected):  # It knows only the arrays of its own preprocessing.
            expected = data.expect(config.data)
            if expected:
                return expected.spec
            source = open_source(config.data)
        return data.element_spec(source, config.data.pp)

    @classmethod
    def _of(
        cls,
        config: ConfigDict,
        mesh: Mesh,
        given: data.Source | data.Expected,
        spec: Mapping[str, ArraySpec],
    ) -> "Run":
        # A source that stands for one that is not at hand trains nothing, so it need not count.
        counts = None if isinstance(given, data.Expected) else data.class_counts(given)
        info = DataInfo(spec, given.num_classes, given.class_names, counts)
        duration = durations(config, len(given))
        task = tasks.build(config.task, config.model, info).with_duration(duration)
        _check_moves(config, task)
        if config.accum_steps > 1:
            task.check_accumulation()
        boxed = tasks.boxed_params(task)
        _warn_of_whole_copies(boxed, mesh)
        params = nn.unbox(boxed)
        keys = config.optim.to_dict()
        keys["freeze"] = task.frozen(params, keys["freeze"])
        optimizer = optim.build(keys, params, duration=duration)
        make_state, abstract = step.init_state(
            task,
            optimizer,
            boxed,
            seed=config.seed,
            ema=config.ema_decay > 0,
            mesh=mesh,
            guard=SpikeGuard.of(config),
            zero1=config.mesh.zero1,
        )
        _check_average(config, optimizer, abstract)
        grad_shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract.params)
        if config.mesh.zero1:
            grad_shardings = sharding.optimizer_shardings(boxed, grad_shardings, mesh)
        return cls(
            config, mesh, given, task, optimizer, duration, make_state, abstract, grad_shardings
        )

    def evaluation_params(self, state: step.State) -> Params:
        """Returns the parameters to evaluate: the teacher of the task's state, if there is one.

        Else these are the parameters, or what the optimizer derives from them and its state.
        """
        teacher = teacher_of(state.task_state)
        if teacher is not None:
            return teacher
        return self.optimizer.evaluation_params(state.params, state.opt_state)

    def num_params(self) -> int:
        """Returns the number of parameters of the model: backbone and head."""
        own = jax.eval_shape(self.task.inference_params, self.abstract.params)
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(own))

    def train_flops_per_example(self) -> int:
        """Returns the floating-point operations of a training step for each example of its batch.

        They are those of the task, and twice as many where SAM computes a second gradient. If
        parameters are frozen, their gradients are not computed, so the products of the traced step
        are an upper bound.
        """
        whole = self.task.train_flops() * (2 if self.optimizer.sam_rho else 1)
        if not any(group.frozen for group in self.optimizer.table.values()):
            return whole
        computed = models.product_flops(self.trace_step().jaxpr)
        return min(whole, computed // self.config.batch_size)

    def compile_step(self) -> jax.stages.Compiled:
        """Compiles the training step for exactly this run's state and batch."""
        return self.compile(self.trace_step().lower())

    def compile(self, lowered: jax.stages.Lowered) -> jax.stages.Compiled:
        """Compiles a traced program with the options for this run's devices."""
        return lowered.compile(compiler_options=compiler_flags.for_mesh(self.mesh))

    def gradients(self) -> Params:
        """Returns the gradients of a step as abstract arrays, with their shardings."""
        return jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
            self.abstract.params,
            self.grad_shardings,
        )

    def trace_step(self) -> jax.stages.Traced:
        """Traces the training step for this run's state, batch and mesh."""
        config = self.config
        jitted = step.make_train_step(
            self.task,
            self.optimizer,
            self.abstract,
            self.mesh,
            accum_steps=config.accum_steps,
            ema_decay=config.ema_decay,
            max_skipped_steps=config.max_skipped_steps,
            guard=SpikeGuard.of(config, self.start),
            grad_shardings=self.grad_shardings,
        )
        batch = sharding.abstract_batch(self.task.info.spec, self.mesh, config.batch_size)
        with sharding.activate(self.mesh):
            return jitted.trace(self.abstract, batch)

    def open_feed(self, start_step: int) -> DeviceFeed:
        """Returns the feed of this process's rows of the training batches after `start_step`."""
        return self.feed_of(self.batches(start_step))

    def batches(self, start_step: int, stop_step: int = sys.maxsize) -> data.Batches:
        """Opens this process's rows of the batches of the steps from `start_step + 1` on.

        stop_step: the last step whose batch is read. Steps count from 1.
        """
        assert not isinstance(self.source, data.Expected)
        return host_batches(
            self.config, self.source, start_step=start_step, stop_step=stop_step, rows=self._rows
        )

    def feed_of(self, batches: Feedable) -> DeviceFeed:
        """Returns a feed that places this process's rows of batches on the devices."""
        rows = self._rows

        def place(batch: HostBatch) -> dict[str, Array]:
            return sharding.place(batch, rows, self.mesh, self.config.batch_size)

        return DeviceFeed(batches, place, self.config.data.prefetch)

    @property
    def _rows(self) -> np.ndarray:
        return sharding.local_rows(self.mesh, self.config.batch_size)

    def originals(self, start_step: int) -> data.Batches:
        """Returns the batches after `start_step` with the preprocessing of evaluation."""
        config = ConfigDict(self.config.to_dict())
        config.data.pp = config.data.eval_pp or config.data.pp
        assert not isinstance(self.source, data.Expected)
        return host_batches(config, self.source, start_step=start_step)

    def batches_seen(self, start_step: int) -> Generator[dict[str, np.ndarray], None, None]:
        """Yields the training batches after `start_step` as the model sees them, in host memory.

        This includes the augmentation of the task on the device, with the random keys of the steps.
        """
        config = self.config
        augment = jax.jit(self.task.augment)
        assert not isinstance(self.source, data.Expected)
        with host_batches(config, self.source, start_step=start_step) as batches:
            for at, batch in enumerate(batches, start_step):
                key = step.random_key(np.uint32(config.seed), step.Purpose.AUGMENT, at)
                yield jax.device_get(augment(batch, key))


def _check_moves(config: ConfigDict, task: tasks.BaseTask) -> None:
    """Raises a `UserError` if preprocessing moves images away from the labels of their places."""
    sets = {f"eval.sets.{name}.pp": one.get("pp", "") for name, one in config.eval.sets.items()}
    for key, pp in {"data.pp": config.data.pp, "data.eval_pp": config.data.eval_pp, **sets}.items():
        data.check_moves(pp, task.placed_labels, f"config.{key}")


def _check_average(config: ConfigDict, optimizer: optim.Optimizer, abstract: step.State) -> None:
    """Raises a `UserError` if two parts of a run would each average the parameters."""
    own = {
        f"optim.name={config.optim.name!r}": optimizer.rule.evaluation_params is not None,
        f"task.name={config.task.name!r}": teacher_of(abstract.task_state) is not None,
    }
    found = [name for name, averages in own.items() if averages]
    if config.ema_decay and found:
        raise UserError(
            f"config.ema_decay={config.ema_decay}: {found[0]} averages the parameters itself;"
            " write 0"
        )
    if len(found) > 1:
        raise UserError(f"config.{found[0]} and {found[1]} both average the parameters")


def _warn_of_whole_copies(boxed: Params, mesh: Mesh) -> None:
    whole = sharding.unnamed(boxed)
    if whole:
        logger.warning(
            "%d parameters name no logical axes (%s, ...), so each of the %d devices holds all of"
            " them; flax.linen.with_logical_partitioning names axes",
            len(whole), whole[0], mesh.size,
        )  # fmt: skip


def open_source(spec: Mapping[str, Any]) -> data.Source:
    """Opens the source that the keys source, name, dir, split and args of a section describe."""
    own = {key: spec[key] for key in ("source", "name", "dir", "split")}
    return data.open_source({**own, **dict(spec["args"])})


def host_batches(
    config: ConfigDict,
    source: data.Source,
    *,
    start_step: int,
    stop_step: int = sys.maxsize,
    rows: np.ndarray | None = None,
) -> data.Batches:
    """Opens the training batches after `start_step`, in host memory.

    Args:
      stop_step: the last step whose batch is read.
      rows: the rows of each batch to read; None for all.
    """
    return data.train_batches(
        source,
        batch_size=config.batch_size,
        rows=np.arange(config.batch_size) if rows is None else rows,
        seed=config.seed,
        start_step=start_step,
        stop_step=stop_step,
        pp=config.data.pp,
        repeats=config.data.repeats,
        on_bad_image=config.data.on_bad_image,
        num_threads=config.data.threads,
        prefetch=config.data.prefetch,
        timeout_s=config.data.timeout,
    )
