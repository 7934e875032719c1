"""Measures evaluation of whole splits, in turns with the forward pass alone."""

import statistics
import time

import jax
from ml_collections import ConfigDict

from vit_jax.parallel import sharding
from vit_jax.training.evaluate import Evaluator
from vit_jax.training.run import Run
from vit_jax.types import Params


def bench_eval(config: ConfigDict, rounds: int = 3) -> dict[str, float]:
    """Measures evaluation of `config.eval.sets`, in turns with as many bare forward passes.

    The bare step processes the same batch on the device every time. `eval_over_forward` is the rate
    of evaluation relative to that of the bare step; its limit is 1. Small splits are decoded once
    and kept in memory, as between the evaluations of a run.
    """
    run = Run.build(config)
    params = run.make_state().params
    evaluator = Evaluator(config, run.task, run.abstract, run.mesh)
    evaluator.run(params)  # Compiles, and fills the cache of small splits.
    forward = _Forward(run, evaluator, params)
    images = sum(len(split.source) for split in evaluator.splits)
    batches = sum(-(-len(split.source) // evaluator.batch_size) for split in evaluator.splits)
    whole, bare = [], []
    for _ in range(rounds):
        started = time.perf_counter()
        evaluator.run(params)
        whole.append(time.perf_counter() - started)
        bare.append(forward.seconds(batches))
    return {
        "images_per_sec": images / statistics.median(whole),
        "forward_images_per_sec": batches * evaluator.batch_size / statistics.median(bare),
        "eval_over_forward": statistics.median(
            alone / evaluated * images / (batches * evaluator.batch_size)
            for alone, evaluated in zip(bare, whole, strict=True)
        ),
    }


class _Forward:
    """The step of the evaluator on the first batch of its first split."""

    def __init__(self, run: Run, evaluator: Evaluator, params: Params):
        self._evaluator = evaluator
        self._mesh = run.mesh
        self._params = evaluator.prepared(params)
        with sharding.activate(run.mesh):
            self._batch = evaluator.place(next(evaluator.batches(evaluator.splits[0])))

    def seconds(self, batches: int) -> float:
        """Returns the seconds that `batches` batches take."""
        sums, rows = self._evaluator.zeros(self._params, self._batch), None
        started = time.perf_counter()
        with sharding.activate(self._mesh):
            for _ in range(batches):
                sums, rows = self._evaluator.step(self._params, self._batch, sums)
        jax.block_until_ready((sums, rows))
        return time.perf_counter() - started
