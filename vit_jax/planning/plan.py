"""Compiles the step for a target and computes its memory, FLOPs, traffic and least time."""

import dataclasses
import pickle
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.experimental import serialize_executable
from ml_collections import ConfigDict

from vit_jax import config as config_lib
from vit_jax import data, models
from vit_jax.errors import UserError, first_line, is_out_of_memory
from vit_jax.parallel import sharding
from vit_jax.planning.hlo import Kernels, Program
from vit_jax.planning.layout import Layout
from vit_jax.planning.target import Target
from vit_jax.training.run import Run
from vit_jax.training.stages import stages_of

ASSUMED_MFU = (0.3, 0.4, 0.5)
"""The shares of the chips' peak, typical of good training steps, for which a plan has the time."""


@dataclasses.dataclass(frozen=True)
class Memory:
    """The bytes that one device holds during a step, by purpose.

    The first four and the task's own state are exact. The compiler reports the sum of all temporary
    arrays. Gradients are the part with the parameters' shapes; activations are the rest, including
    workspace.
    """

    parameters: int
    average: int
    optimizer: int
    batch: int
    gradients: int
    activations: int
    code: int
    task_state: int = 0

    @property
    def total(self) -> int:
        return sum(dataclasses.astuple(self))


@dataclasses.dataclass(frozen=True)
class Plan:
    """The resources that a run takes on a target.

    Bytes are those of one device, FLOPs those of all devices together.

    Attributes:
      hbm_bytes: the memory of a device; 0 where it is not known.
      used_bytes: the memory of a device that the step needs.
      flops: model FLOPs of one step: a backward pass counts as two forward passes, and
        recomputation does not count.
      computed_flops: FLOPs of all products of the step, including recomputation and the optimizer.
      kernels: the kernels that a device runs.
      hbm_traffic: the least bytes that a device moves to and from memory in a step.
      ici_bytes, dcn_bytes: the bytes that a device sends in a step inside its slice, and to others.
      overlapped_bytes: the part of ici_bytes that is sent during computation.
      sides: chips along each side of a TPU slice.
      mesh_that_sends_less: a mesh to prefer where XLA sends whole kernels or gradients over `mesh`.
      save_bytes: the bytes that a save writes, of all hosts together.
      least_seconds: the time of a step by the slowest of compute, memory and both networks, each at
        its peak.
    """

    topology: str
    num_slices: int
    num_devices: int
    num_chips: int
    mesh: Mapping[str, int]
    settings: Mapping[str, Any]
    batch_size: int
    num_params: int
    total_steps: int
    total_images: int
    memory: Memory
    hbm_bytes: int
    used_bytes: int
    fits: bool
    flops: int
    flops_per_device: float
    compile_seconds: float
    computed_flops: int = 0
    kernels: Kernels | None = None
    hbm_traffic: int = 0
    ici_bytes: float = 0.0
    overlapped_bytes: float = 0.0
    mesh_that_sends_less: Mapping[str, Any] | None = None
    dcn_bytes: float = 0.0
    sides: tuple[int, ...] = ()
    num_hosts: int = 1
    save_bytes: int = 0
    bounds: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @property
    def layout(self) -> Layout:
        zero1 = self.settings["zero1"]
        return Layout(self.mesh, zero1, self.num_devices, self.num_slices, self.sides)

    @property
    def least_seconds(self) -> float:
        return max(self.bounds.values(), default=0.0)

    @property
    def bound_by(self) -> str:
        return max(self.bounds, key=lambda name: self.bounds[name]) if self.bounds else ""

    @property
    def total_flops(self) -> int:
        """Returns the model FLOPs of all steps."""
        return self.flops * self.total_steps

    def of_steps(self, steps: int) -> "Plan":
        """Returns the plan of another number of the same steps, such as those of a stage."""
        images = steps * self.batch_size
        return dataclasses.replace(self, total_steps=steps, total_images=images)

    def seconds_at(self, mfu: float) -> float:
        """Returns the seconds of a step at a share of the chips' peak; 0 if the peak is unknown."""
        peak = self.flops_per_device * self.num_devices
        return self.flops / (mfu * peak) if peak else 0.0

    def as_json(self) -> dict[str, Any]:
        """Returns the plan as plain numbers and names, with units in the names."""
        times = {
            f"{mfu:.0%}": {
                "step_seconds": self.seconds_at(mfu),
                "hours": self.seconds_at(mfu) * self.total_steps / 3600,
                "chip_hours": self.seconds_at(mfu) * self.total_steps * self.num_chips / 3600,
            }
            for mfu in ASSUMED_MFU
        }
        fields = dataclasses.asdict(self)
        fields["total_flops"] = self.total_flops
        return {**fields, "least_step_seconds": self.least_seconds, "at_mfu": times}


def make_plan(config: ConfigDict, target: Target) -> tuple[Plan, list[sharding.Placement]]:
    """Compiles the step of `config` for `target`; also returns the placements of all parameters.

    Raises:
      UserError: the config is wrong.
    """
    return _plan_run(_build_run(config, target), target)


class StagePlan(NamedTuple):
    """The plan of one stage of a run, with the config and the steps of the stage.

    The name is "" for the config itself.
    """

    name: str
    title: str
    config: ConfigDict
    plan: Plan
    placements: list[sharding.Placement]


def plan_stages(
    config: ConfigDict, target: Target, *, save: str | None = None, but: str | None = None
) -> list[StagePlan]:
    """Compiles the step of each stage of `config` for `target`; a run without stages is one.

    save: the file for the compiled program of the last stage. but: the name of a stage that is left
      out.

    Raises:
      UserError: the config is wrong, or the program cannot be saved.
    """
    found = []
    stages = stages_of(_build_run(config, target))
    for stage in (one for one in stages if one.name != but):
        own = save if stage is stages[-1] else None
        plan, placements = _plan_run(stage.run, target, save=own)
        plan = plan.of_steps(stage.end - stage.start)
        found.append(StagePlan(stage.name, str(stage), stage.run.config, plan, placements))
    return found


def _build_run(config: ConfigDict, target: Target) -> Run:
    return Run.build(config, target.devices, data.expect(config.data))


def _plan_run(
    run: Run, target: Target, *, save: str | None = None
) -> tuple[Plan, list[sharding.Placement]]:
    traced = run.trace_step()
    started = time.perf_counter()
    compiled, needed = None, 0
    try:
        compiled = run.compile(traced.lower())
    except jax.errors.JaxRuntimeError as error:
        needed = _bytes_needed(error)
    seconds = time.perf_counter() - started
    products = models.product_flops(traced.jaxpr)
    plan = _without_traffic(run, target, _memory(run, compiled, needed), products, seconds)
    if compiled is not None:
        if save:
            save_executable(compiled, save)
        fits = not plan.hbm_bytes or plan.used_bytes <= plan.hbm_bytes
        plan = dataclasses.replace(_with_traffic(plan, target, compiled), fits=fits)
    return plan, sharding.placements(run.abstract.params)


def _bytes_needed(error: Exception) -> int:
    """Returns the memory of a program that does not fit, from the compiler's message."""
    text = str(error)
    if not is_out_of_memory(error):
        raise error
    found = re.search(r"(?:required[^(]*\(|Used )([\d.]+)([KMGT])", text)
    if not found:
        raise error
    return int(float(found[1]) * 1024 ** (1 + "KMGT".index(found[2])))


def _memory(run: Run, compiled: jax.stages.Compiled | None, needed: int) -> Memory:
    """Returns the memory of a step.

    needed: the bytes of temporary arrays, if the compiler refused the program for them.
    """
    state = run.abstract
    temporary, code = needed, 0
    if compiled is not None:
        analysis = compiled.memory_analysis()
        assert analysis is not None
        temporary, code = analysis.temp_size_in_bytes, analysis.generated_code_size_in_bytes
    gradients = min(sharding.bytes_per_device(run.gradients()), temporary)
    batch = sharding.abstract_batch(run.task.info.spec, run.mesh, run.config.batch_size)
    return Memory(
        parameters=sharding.bytes_per_device(state.params),
        average=0 if state.ema is None else sharding.bytes_per_device(state.ema),
        optimizer=sharding.bytes_per_device(state.opt_state),
        batch=sharding.bytes_per_device(batch),
        gradients=gradients,
        activations=temporary - gradients,
        code=code,
        task_state=sharding.bytes_per_device(state.task_state),
    )


def _without_traffic(
    run: Run, target: Target, memory: Memory, computed_flops: int, compile_seconds: float
) -> Plan:
    config, chip = run.config, target.chip
    return Plan(
        topology=target.name,
        num_slices=target.num_slices,
        num_devices=len(target.devices),
        num_chips=target.num_chips,
        sides=target.sides,
        num_hosts=target.num_hosts,
        save_bytes=sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(run.abstract)),
        mesh=dict(run.mesh.shape),
        settings={
            "remat": config.model.get("remat", "none"),
            "accum_steps": config.accum_steps,
            "zero1": config.mesh.zero1,
        },
        batch_size=config.batch_size,
        num_params=run.num_params(),
        total_steps=run.duration.total,
        total_images=run.duration.total * config.batch_size,
        memory=memory,
        hbm_bytes=chip.hbm_bytes_per_device if chip else 0,
        used_bytes=memory.total,
        fits=False,
        flops=run.train_flops_per_example() * config.batch_size,
        flops_per_device=chip.flops_per_device if chip else 0.0,
        compile_seconds=compile_seconds,
        computed_flops=computed_flops,
    )


def _with_traffic(plan: Plan, target: Target, compiled: Any) -> Plan:
    program = Program(compiled.as_text())
    collectives = program.collectives()
    near = sum(c.total_sent for c in collectives)
    shards = plan.layout.gradient_shards
    wholes = (c for c in collectives if c.kind == "all-reduce" and c.group_size >= shards)
    # A device sends this much if all gradients are scattered in bfloat16.
    scattered = plan.memory.gradients / 2 * (shards - 1)
    is_more = sum(c.total_sent for c in wholes) > scattered / 2
    far = program.sent_between_slices(plan.num_slices)
    # Every array that is written is read at least once.
    traffic = 2 * program.stored_bytes()
    bounds = {}
    chip = target.chip
    if chip:
        share = chip.devices
        bounds["compute"] = plan.flops / plan.num_devices / chip.flops_per_device
        bounds["memory"] = traffic / (chip.hbm_bandwidth / share)
        # A chip's link bandwidth counts both directions, and sending uses half of it.
        bounds["links"] = near / (chip.link_bandwidth / 2 / share)
        if chip.dcn_bandwidth:
            bounds["network"] = far / (chip.dcn_bandwidth / share)
    return dataclasses.replace(
        plan,
        kernels=program.kernels(),
        hbm_traffic=traffic,
        ici_bytes=near,
        overlapped_bytes=sum(c.total_sent for c in collectives if c.is_overlapped),
        mesh_that_sends_less=plan.layout.on_part_of_slice() if is_more else None,
        dcn_bytes=far,
        bounds=bounds,
    )


def save_executable(compiled: Any, path: str) -> None:
    """Writes a compiled program for `jax.experimental.serialize_executable`.

    Raises:
      UserError: JAX cannot serialize the program.
    """
    try:
        payload = pickle.dumps(serialize_executable.serialize(compiled))
    except Exception as error:
        reason = first_line(error)
        raise UserError(f"plan: --save={path}: JAX cannot save this program: {reason}") from error
    Path(path).write_bytes(payload)


def with_overrides(config: ConfigDict, overrides: Mapping[str, Any]) -> ConfigDict:
    """Returns a validated copy of a config with other values."""
    changed = ConfigDict(config.to_dict(), type_safe=False)
    for key, value in overrides.items():
        config_lib.set_key(changed, key, value)
    return config_lib.validate(changed)
