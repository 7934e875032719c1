"""Searches remat policy, accumulation and sharding for the fastest setting that fits.

Every setting that is proposed has been compiled.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from vit_jax import models
from vit_jax.parallel import sharding
from vit_jax.parallel.accelerators import GIB
from vit_jax.planning.layout import time_factor
from vit_jax.planning.plan import Plan, make_plan, with_overrides
from vit_jax.planning.target import Target

MAX_COMPILES = 10
"""The most compiles of one search.

A compile takes a minute or more, so the estimates below rule out the other candidates first.
"""

# Times are relative to keeping all activations; recomputing every block adds a third. Memory is
# that of the activations kept, relative to "full"; ViT-B/16 with 128 images on a v5e keeps 24.4,
# 9.5, 6.5 and 2.5 GiB.
_REMAT_TIME: Mapping[str | None, float] = {
    "none": 1.0, "dots_saveable": 1.02, "dots_with_no_batch_dims_saveable": 1.06, "full": 1.33,
}  # fmt: skip
_REMAT_MEMORY = {
    "none": 9.7, "dots_saveable": 3.8, "dots_with_no_batch_dims_saveable": 2.6, "full": 1.0,
}  # fmt: skip
# Each doubling of accumulation adds this share, because products are smaller and gathers more.
_ACCUMULATION_TIME = 0.02
# Estimates may err, so a candidate is left out only if this share of its estimate does not fit.
_CAUTION = 0.8


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A candidate setting. `remat` is None for models without that field."""

    remat: str | None
    accum_steps: int
    mesh: tuple[tuple[str, Any], ...]
    time: float

    def overrides(self) -> dict[str, Any]:
        """Returns the config keys that it sets."""
        own = {"accum_steps": self.accum_steps, **{f"mesh.{k}": v for k, v in self.mesh}}
        return own if self.remat is None else {"model.remat": self.remat, **own}


@dataclasses.dataclass(frozen=True)
class Fit:
    """The result of a search.

    Attributes:
      plan: the plan of the setting that fits, or of the one that comes closest.
      tried: the number of compiles.
    """

    plan: Plan
    overrides: Mapping[str, Any]
    tried: int


def command_line(overrides: Mapping[str, Any]) -> str:
    """Returns overrides as arguments of a command line."""
    return " ".join(f"--config.{key}={value}" for key, value in overrides.items())


def fit(
    config: ConfigDict,
    target: Target,
    plan: Plan,
    say: Callable[[str], None] = lambda _: None,
    place_of: Callable[[str], str] = str,
) -> Fit:
    """Compiles candidates, the fastest first, until one fits.

    Args:
      plan: the plan of the unchanged `config`.
      say: a function that prints a line about each compile.
      place_of: returns the key that a user has to set for a key of `config`, which may be that of a
        stage.
    """
    best, tried, known = Fit(plan, {}, 0), 0, plan
    tested = {_setting(plan)}
    for candidate in sorted(candidates(config, plan), key=lambda c: c.time):
        if tried == MAX_COMPILES or (plan.fits and candidate.time >= _time_of(plan)):
            break
        changed = with_overrides(config, candidate.overrides())
        expected = estimate(known, candidate)
        if _setting_of(candidate, plan) in tested or _CAUTION * expected > plan.hbm_bytes:
            continue
        found = make_plan(changed, target)[0].of_steps(plan.total_steps)
        tried += 1
        tested.add(_setting(found))
        verdict = "fits" if found.fits else "does not fit"
        overrides = changes(candidate, plan, place_of)
        say(f"{command_line(overrides)}: {found.used_bytes / GIB:.2f} GiB, {verdict}")
        if found.fits:
            return Fit(found, overrides, tried)
        if found.used_bytes < best.plan.used_bytes and not best.plan.fits:
            best = Fit(found, overrides, tried)
        known = found
    return dataclasses.replace(best, tried=tried)


def advice(
    config: ConfigDict, plan: Plan, place_of: Callable[[str], str] = str, limit: int = 3
) -> list[str]:
    """Returns settings that should fit by estimate, the fastest first.

    place_of: as in `fit`.
    """
    lines, seen = [], set()
    for candidate in sorted(candidates(config, plan), key=lambda c: c.time):
        expected = estimate(plan, candidate)
        if expected <= plan.hbm_bytes and candidate.remat not in seen:
            seen.add(candidate.remat)
            text = command_line(changes(candidate, plan, place_of))
            lines.append(f"{text} (about {expected / GIB:.1f} GiB)")
    return lines[:limit]


def changes(
    candidate: Candidate, plan: Plan, place_of: Callable[[str], str] = str
) -> dict[str, Any]:
    """Returns what a candidate sets differently from the planned config.

    place_of: as in `fit`.
    """
    own = {
        "model.remat": plan.settings["remat"],
        "accum_steps": plan.settings["accum_steps"],
        "mesh.zero1": plan.settings["zero1"],
        **{f"mesh.{axis}": size for axis, size in plan.mesh.items()},
    }
    return {place_of(k): v for k, v in candidate.overrides().items() if own.get(k) != v}


def candidates(config: ConfigDict, plan: Plan) -> Iterator[Candidate]:
    """Yields every setting of the search that divides the batch evenly."""
    meshes = plan.layout.alternatives()
    for remat, mesh, power in itertools.product(_remats(config), meshes, range(9)):
        accum = 2**power
        parts = accum * math.prod(mesh[axis] for axis in sharding.BATCH_AXES)
        if config.batch_size % parts == 0:
            time = _time(remat, accum, mesh)
            yield Candidate(remat, accum, tuple(mesh.items()), time)


def _time(remat: str | None, accum_steps: int, mesh: Mapping[str, Any]) -> float:
    """Returns the estimated time of a step, relative to the cheapest setting."""
    time = _REMAT_TIME.get(remat, 1.0) * (1 + _ACCUMULATION_TIME * math.log2(accum_steps))
    return time * time_factor(mesh)


def estimate(known: Plan, candidate: Candidate) -> float:
    """Returns bytes per device, scaled from a compiled plan of the same model and batch."""
    activations = known.memory.activations
    activations *= known.settings["accum_steps"] / candidate.accum_steps
    if candidate.remat is not None:
        activations *= _REMAT_MEMORY[candidate.remat] / _REMAT_MEMORY[known.settings["remat"]]
    memory = known.memory
    params_split, mirrors_split = known.layout.splits_more(dict(candidate.mesh))
    mirrors = memory.optimizer + memory.average + memory.gradients
    state = (memory.parameters + memory.task_state) / params_split + mirrors / mirrors_split
    return activations + memory.batch + memory.code + state


def _remats(config: ConfigDict) -> list[str | None]:
    has_remat = "remat" in models.field_names(config.model.name)
    return list(_REMAT_TIME) if has_remat else [None]


def _setting(plan: Plan) -> tuple:
    return (*plan.settings.values(), *plan.mesh.values())


def _setting_of(candidate: Candidate, plan: Plan) -> tuple:
    mesh = dict(candidate.mesh)
    remat = plan.settings["remat"] if candidate.remat is None else candidate.remat
    return (remat, candidate.accum_steps, mesh.pop("zero1"), *mesh.values())


def _time_of(plan: Plan) -> float:
    settings = plan.settings
    mesh = {**plan.mesh, "zero1": settings["zero1"]}
    return _time(settings["remat"], settings["accum_steps"], mesh)
