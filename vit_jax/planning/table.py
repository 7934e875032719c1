"""Formats a plan as the text that the command prints."""

from collections.abc import Iterator, Sequence

from vit_jax.parallel.accelerators import GIB
from vit_jax.planning.feeding import Feeding
from vit_jax.planning.fit import command_line
from vit_jax.planning.plan import ASSUMED_MFU, Plan


def gib(size: float) -> str:
    """Returns a number of bytes as text in GiB, or in MiB if it is small."""
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{1024 * size / GIB:.2f} MiB"


SPOT_SECONDS = 30
"""The notice before a Spot host ends (docs.cloud.google.com/compute/docs/instances/spot)."""


def table(plan: Plan, feeding: Feeding | None = None, write_rate: float = 100.0) -> str:
    """Returns aligned rows of name and value.

    write_rate: megabytes per second that a host writes to the workdir.
    """
    rows = [*_machine(plan), *_memory(plan), *_work(plan), *_time(plan), *_save(plan, write_rate)]
    rows += feeding.rows() if feeding else ()
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:{width}}  {value}".rstrip() for name, value in rows)


def petaflops(flops: float) -> str:
    """Returns a number of FLOPs as text."""
    return f"{flops / 1e15:,.3g} PFLOP" if flops < 1e18 else f"{flops / 1e15:,.0f} PFLOP"


def whole_run(plans: Sequence[Plan]) -> str:
    """Returns a line with the FLOPs of a run, and of one in the last stage's settings alone."""
    flops = sum(plan.total_flops for plan in plans)
    alone = plans[-1].flops * sum(plan.total_steps for plan in plans)
    share = f", {flops / alone:.0%} of a run in the settings of the last stage" if alone else ""
    return f"all stages: {petaflops(flops)}{share}"


def _machine(plan: Plan) -> Iterator[tuple[str, str]]:
    slices = f"{plan.num_slices} × " if plan.num_slices > 1 else ""
    yield "topology", f"{slices}{plan.topology}: {plan.num_chips} chips, {plan.num_devices} devices"
    yield "mesh", " × ".join(f"{axis} {size}" for axis, size in plan.mesh.items())
    yield "settings", ", ".join(f"{name} {value}" for name, value in plan.settings.items())
    yield "parameters", f"{plan.num_params:,}"
    yield "batch", f"{plan.batch_size:,} ({plan.batch_size / plan.num_devices:g} a device)"
    yield "steps", f"{plan.total_steps:,} ({plan.total_images:,} images)"
    yield "compile time", f"{plan.compile_seconds:.0f} s"


def _memory(plan: Plan) -> Iterator[tuple[str, str]]:
    memory = plan.memory
    has = f" of {gib(plan.hbm_bytes)}" if plan.hbm_bytes else ""
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    yield "memory per device", f"{gib(plan.used_bytes)}{has}: {verdict}"
    yield "  parameters", gib(memory.parameters)
    if memory.average:
        yield "  their average", gib(memory.average)
    if memory.task_state:
        yield "  state of the task", gib(memory.task_state)
    yield "  optimizer state", gib(memory.optimizer)
    yield "  batch", gib(memory.batch)
    yield "  gradients", gib(memory.gradients)
    yield "  activations", gib(memory.activations)
    if memory.code:
        yield "  code", gib(memory.code)


def _work(plan: Plan) -> Iterator[tuple[str, str]]:
    yield "FLOPs per step", f"{plan.flops / 1e12:,.2f} TFLOP (model's products, backward included)"
    yield "  of all steps", petaflops(plan.total_flops)
    if plan.flops and plan.computed_flops:
        again = plan.computed_flops / plan.flops
        yield "  computed", f"{again:.2f} times that (with what is computed again, the optimizer's)"
    if plan.kernels:
        kernels = plan.kernels
        yield (
            "kernels",
            f"{kernels.fusions:,} fusions and {kernels.copies:,} copies"
            f" ({kernels.copied_bytes / 1e9:.2f} GB) per device and step",
        )
    if plan.hbm_traffic:
        intensity = plan.flops / plan.num_devices / plan.hbm_traffic
        yield (
            "memory traffic",
            f"{plan.hbm_traffic / 1e9:.2f} GB per device and step; {intensity:.0f} FLOP a byte",
        )
        beside = plan.overlapped_bytes / plan.ici_bytes if plan.ici_bytes else 0.0
        yield (
            "sent in the slice",
            f"{plan.ici_bytes / 1e6:,.1f} MB per device and step, {beside:.0%} beside computation",
        )
        if plan.mesh_that_sends_less:
            own = {**plan.mesh, "zero1": plan.settings["zero1"]}
            other = plan.mesh_that_sends_less
            changed = {f"mesh.{name}": size for name, size in other.items() if size != own[name]}
            yield (
                "  more than needed",
                "over all of this slice XLA sends whole kernels; less is sent with "
                + command_line(changed),
            )
    if plan.num_slices > 1:
        yield "sent between slices", f"{plan.dcn_bytes / 1e6:,.1f} MB per device and step"


def _time(plan: Plan) -> Iterator[tuple[str, str]]:
    if not plan.flops_per_device:
        return
    if plan.bounds:
        parts = ", ".join(f"{name} {1e3 * s:.1f}" for name, s in plan.bounds.items())
        yield "least step time", f"{1e3 * plan.least_seconds:.1f} ms, of {plan.bound_by} ({parts})"
    for mfu in ASSUMED_MFU:
        seconds = plan.seconds_at(mfu)
        hours = seconds * plan.total_steps / 3600
        note = " (below the least step time)" if seconds < plan.least_seconds else ""
        yield (
            f"at {mfu:.0%} MFU",
            f"{1e3 * seconds:.1f} ms a step, {plan.batch_size / seconds:,.0f} images/s,"
            f" {hours:,.1f} h, {hours * plan.num_chips:,.0f} chip-hours{note}",
        )


def _save(plan: Plan, write_rate: float) -> Iterator[tuple[str, str]]:
    if not plan.save_bytes:
        return
    # Hosts share the work: arrays of a megabyte or more are split over the hosts that hold them.
    share = plan.save_bytes / plan.num_hosts
    seconds = share / (write_rate * 1e6)
    verdict = "within" if seconds < SPOT_SECONDS else "LONGER than"
    hosts = f" ({gib(share)} from each of {plan.num_hosts} hosts)" if plan.num_hosts > 1 else ""
    yield (
        "a save",
        f"{gib(plan.save_bytes)}{hosts}: {seconds:,.1f} s at {write_rate:g} MB/s a host"
        f" (--write-rate), {verdict} the {SPOT_SECONDS} s notice of Spot",
    )
