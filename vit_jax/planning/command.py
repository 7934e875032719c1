"""The implementation of the command `plan`: its output and its errors."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from vit_jax.config.stages import place_of as place_in_config
from vit_jax.errors import DoesNotFit, UserError
from vit_jax.parallel import sharding
from vit_jax.planning import fit as fitting
from vit_jax.planning.feeding import Feeding, Rate
from vit_jax.planning.plan import Plan, StagePlan, plan_stages, with_overrides
from vit_jax.planning.table import gib, table, whole_run
from vit_jax.planning.target import Target
from vit_jax.storage import json_text, write_output


def run(
    config: ConfigDict,
    topology: str,
    num_slices: int,
    *,
    search: bool = False,
    placements: bool = False,
    rate: Rate | None = None,
    write_rate: float = 100.0,
    json_file: str | None = None,
    save: str | None = None,
) -> None:
    """Prints the plan of a config; with `search` also the fastest setting that fits.

    With `config.stages` each stage has its own plan; the search, the file and the error are about
    the stage that needs the most memory.

    Args:
      placements: prints the placement of every parameter, too.
      rate: the rate of one core of a host, if it was measured.
      write_rate: megabytes per second that a host writes to the workdir.
      save: the file for the compiled program, of the last stage.

    Raises:
      UserError: config, topology or a file is wrong.
      DoesNotFit: the step of a stage needs more memory than a device has; the message has the
        difference.
    """
    target, given = Target.find(topology, num_slices), config
    if search:
        _check_memory_is_known(target)
    stages = plan_stages(config, target, save=save)
    if placements:
        print(sharding.table(stages[-1].placements) + "\n")
    texts = [
        table(one.plan, _feeding(config, target, one.plan, rate), write_rate) for one in stages
    ]
    _print_plans(stages, texts)
    *others, fullest = sorted(stages, key=lambda stage: stage.plan.used_bytes)
    place_of = functools.partial(place_in_config, config.to_dict(), fullest.name)
    plan, config = fullest.plan, fullest.config
    of_stage = f" in {fullest.title}" if len(stages) > 1 else ""
    feeding = _feeding(config, target, plan, rate)
    overrides: Mapping[str, Any] = {}
    if search:
        found = fitting.fit(config, target, plan, lambda line: print(f"tried {line}"), place_of)
        plan, overrides = found.plan, found.overrides
        feeding = _feeding(config, target, plan, rate)
        _print_found(found, feeding, write_rate, of_stage)
    elif not plan.fits:
        _print_advice(fitting.advice(config, plan, place_of), of_stage)
    if json_file:
        told = {"overrides": dict(overrides), "feeding": feeding and dataclasses.asdict(feeding)}
        text = json_text({**plan.as_json(), **told, **_stages_json(stages)}, indent=2)
        write_output(json_file, text + "\n")
    if not plan.fits:
        raise DoesNotFit(_shortfall(plan, of_stage))
    if others and overrides:
        _check_others_fit(given, target, overrides, fullest.name)


def _check_others_fit(
    config: ConfigDict, target: Target, overrides: Mapping[str, Any], fitted: str
) -> None:
    """Raises a `DoesNotFit` unless the stages but `fitted` fit with what the search has found."""
    for stage in plan_stages(with_overrides(config, overrides), target, but=fitted):
        if not stage.plan.fits:
            raise DoesNotFit(_shortfall(stage.plan, f" in {stage.title}"))


def _check_memory_is_known(target: Target) -> None:
    if target.chip is None:
        raise UserError(
            f"plan: --fit needs to know a device's memory, and {target.name} is not in the table"
            " of chips; name a TPU with --topology"
        )


def _print_plans(stages: Sequence[StagePlan], texts: Sequence[str]) -> None:
    """Prints the tables of all stages; if there are several, with their titles and the sum."""
    if len(stages) == 1:
        print(texts[0])
        return
    for stage, text in zip(stages, texts, strict=True):
        print(f"{stage.title}\n\n{text}\n")
    print(whole_run([stage.plan for stage in stages]))


def _stages_json(stages: Sequence[StagePlan]) -> dict[str, Any]:
    """Returns the plans of all stages and their sums; {} for a run without stages."""
    if len(stages) == 1:
        return {}
    return {
        "all_steps": sum(one.plan.total_steps for one in stages),
        "all_flops": sum(one.plan.total_flops for one in stages),
        "stages": [{"stage": one.title, **one.plan.as_json()} for one in stages],
    }


def _feeding(config: ConfigDict, target: Target, plan: Plan, rate: Rate | None) -> Feeding | None:
    """Returns the demands on the hosts; None where the least step time is not known."""
    if not plan.least_seconds:
        return None
    return Feeding.of(config, plan.batch_size / plan.least_seconds, target.num_hosts, rate)


def _print_found(
    found: fitting.Fit, feeding: Feeding | None, write_rate: float, of_stage: str
) -> None:
    if found.tried and found.plan.fits:
        print(f"\nthe fastest that fits{of_stage}, of {found.tried} compiled:\n")
        print(table(found.plan, feeding, write_rate))
        print(f"\nwrite: {fitting.command_line(found.overrides)}")
    elif found.plan.fits:
        print(f"\nnothing faster is left to try{of_stage}: it fits as it is")


def _print_advice(lines: Sequence[str], of_stage: str) -> None:
    if lines:
        print(f"\nby estimate these would fit{of_stage}, the fastest first; --fit makes sure:")
        print("\n".join(f"  {line}" for line in lines))
    else:
        print("\nno remat policy, accumulation or sharding is enough; take more or larger chips")


def _shortfall(plan: Plan, of_stage: str) -> str:
    missing = plan.used_bytes - plan.hbm_bytes
    return (
        f"plan: does not fit: a step{of_stage} needs {gib(plan.used_bytes)} of each device's"
        f" {gib(plan.hbm_bytes)}, {gib(max(0, missing))} too much"
    )
