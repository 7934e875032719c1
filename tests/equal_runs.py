"""Runs that compute the same share one trace of each program: half of the time of a short run.

Each run is still built, which finds its mistakes, and then gets the task, the optimizer and the
jitted functions of an equal one before it. What a test replaces for a while in the parts of the
package that are traced, and what comes from outside of it, is always traced anew.
"""

import contextlib
import dataclasses
import functools
import re
import sys

import jax
import numpy as np
import pytest

from vit_jax.inference.predict import Predictor
from vit_jax.training import step
from vit_jax.training.run import Run

TRACED = re.compile(
    r"vit_jax\.(models|tasks|optim|augment|parallel\.sharding|training\.(step|spikes))(\.|$)"
)
OUTSIDE = re.compile(r"\w:\w")  # A plug-in, by module and name.
DURATION = re.compile(r"\s*\.?\d")  # A text such as "50%".
SETTINGS = (
    *("enable_x64", "default_matmul_precision", "numpy_dtype_promotion", "numpy_rank_promotion"),
    *("disable_jit", "debug_nans", "debug_infs", "default_prng_impl", "threefry_partitionable"),
)
SHARED = "task", "optimizer", "make_state", "abstract", "grad_shardings", "mesh"
MOST_KEPT = 30

_kept = {}


def forget():
    """Drops all that runs share."""
    _kept.clear()


@contextlib.contextmanager
def shared():
    """Within this context equal runs share what they trace."""
    build, make_train_step, make_eval_step = Run.build, step.make_train_step, step.make_eval_step

    def built(*args, **kwargs):
        run = build(*args, **kwargs)
        found = _remember("run", _key(run), lambda: run, (run.task,))
        return dataclasses.replace(run, **{name: getattr(found, name) for name in SHARED})

    def train_step(task, optimizer, abstract, mesh, **keys):
        parts = task, optimizer, abstract, keys.get("grad_shardings")
        plain = {name: repr(value) for name, value in keys.items() if name != "grad_shardings"}
        key = tuple(map(id, parts)), mesh, tuple(plain.items())
        make = lambda: make_train_step(task, optimizer, abstract, mesh, **keys)  # noqa: E731
        return _remember("train", key, make, parts)

    def eval_step(task, params, mesh):
        leaves, structure = jax.tree.flatten(params)
        key = id(task), tuple(leaves), structure, mesh
        return _remember("eval", key, lambda: make_eval_step(task, params, mesh), (task,))

    def jitted_predict(self):
        return _remember(
            "predict", _task_key(self.task), lambda: jax.jit(self.task.predict), (self.task,)
        )

    predict = functools.cached_property(jitted_predict)
    predict.__set_name__(Predictor, "_predict")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Predictor, "_predict", predict)
        patch.setattr(Run, "build", built)
        patch.setattr(step, "make_train_step", train_step)
        patch.setattr(step, "make_eval_step", eval_step)
        yield
    forget()


def _remember(kind, key, make, alive):
    """Returns what was made for an equal key by the same code; `alive` are objects named by id."""
    if key is None:
        return make()
    key = key, settings()
    code = _code()
    found = _kept.pop((kind, key), None)
    if found is None or any(code.get(name) is not value for name, value in found[1].items()):
        found = make(), code, alive
    _kept[kind, key] = found
    while len(_kept) > MOST_KEPT:
        _kept.pop(next(iter(_kept)))
    return found[0]


def settings():
    """The settings of JAX that change what is traced, as they are in the present context."""
    values = [getattr(jax.config, f"jax_{name}") for name in SETTINGS]
    return *values, jax.config.read("jax_disable_most_optimizations")


def _key(run):
    """All that the programs of a run depend on; None if something from outside is among it."""
    config = run.config
    sections = (config.model, config.task, config.optim, config.mesh, config.spikes)
    described = repr([section.to_dict() for section in sections])
    if OUTSIDE.search(described):
        return None
    is_free = config.task.name == "classification" and not _needs_duration(config.optim.to_dict())
    duration = None if is_free else repr(run.duration)
    numbers = config.seed, config.batch_size, config.accum_steps, config.ema_decay, config.precision
    info = run.task.info
    counts = None if info.class_counts is None else tuple(info.class_counts)
    return (
        described, numbers, config.max_skipped_steps, duration, run.mesh,
        repr(info._replace(class_counts=None)), counts, type(run.task),
    )  # fmt: skip


def _needs_duration(optim):
    """Whether an optimizer may depend on the length of the run or of an epoch."""
    schedules = [optim["schedule"], *(keys for _, keys in optim["group_schedules"])]
    schedules += [optim["decay_schedule"]] if optim["decay_schedule"] else []
    flat = all(keys.get("name") == "constant" and not keys.get("cooldown") for keys in schedules)
    texts = [leaf for leaf in jax.tree.leaves(optim) if isinstance(leaf, str)]
    return not flat or any(map(DURATION.match, texts))


def _task_key(task):
    """All that a task computes with; None if something from outside is among it."""
    owners = type(task), type(task.model), type(getattr(task.model, "backbone", task.model))
    if not all(TRACED.match(owner.__module__) for owner in owners):
        return None
    fields = {
        name: value
        for name, value in sorted(vars(task).items())
        if not isinstance(getattr(owners[0], name, None), functools.cached_property)
    }
    with np.printoptions(threshold=sys.maxsize, floatmode="unique"):
        return *owners, repr(fields)


def _code():
    """Everything that is defined in what is traced, by its owner and name."""
    found = {}
    for name, module in list(sys.modules.items()):
        if TRACED.match(name):
            for attribute, value in list(vars(module).items()):
                if attribute != "make_mesh":  # Keys have the mesh itself.
                    found[name, attribute] = value
                if isinstance(value, type) and TRACED.match(value.__module__):
                    parts = vars(value).items()  # Flax changes what describes a module's fields.
                    found |= {(value, k): v for k, v in parts if callable(v) or k[:2] != "__"}
    return found
