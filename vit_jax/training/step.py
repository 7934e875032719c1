"""The training state, and the jitted steps of training and evaluation.

Every random number is a function of (seed, purpose, step): `random_key` is the only source of
keys, so a resumed run, or one on another mesh, draws what the undisturbed run would have drawn.
"""

import enum
import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from vit_jax import optim
from vit_jax.errors import UserError
from vit_jax.optim.averaging import ema_update
from vit_jax.parallel import sharding
from vit_jax.tasks import BaseTask
from vit_jax.training import spikes
from vit_jax.training.spikes import LossHistory, SpikeGuard
from vit_jax.types import Array, Batch, Params


class Purpose(enum.IntEnum):
    """The use of a random key. The numbers are part of every result and never change."""

    INIT = 0
    AUGMENT = 1
    DROPOUT = 2


class State(flax.struct.PyTreeNode):
    """Everything that a step changes.

    Attributes:
      step: int32, the number of steps so far; it selects the batch, the keys and the learning rate.
      seed: uint32, the root of the random keys.
      params: the parameters, as the task initializes them.
      opt_state: the state of the optimizer.
      ema: the moving average of `params`, or None if `config.ema_decay` is 0.
      bad_steps: int32, the number of steps in a row whose loss or gradient was not finite.
      losses: the memory of the guard against spikes, or None if `config.spikes` is off.
      task_state: what the task keeps from step to step (see `BaseTask.init_state`), or None.
    """

    step: Array
    seed: Array
    params: Params
    opt_state: Any
    ema: Params | None
    bad_steps: Array
    losses: LossHistory | None = None
    task_state: Params | None = None


def random_key(seed: Array | np.uint32, purpose: Purpose, step: Array | int = 0) -> Array:
    """Returns the key for one purpose at one step."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), purpose), step)


def first_task_state(task: BaseTask, params: Params, seed: Array | int) -> Params | None:
    """Returns the task's own state for parameters that a run starts with; None if it has none."""
    found = task.init_state(params, random_key(jnp.uint32(seed), Purpose.INIT, 1))
    # Copies, because the step reuses the memory of the parameters.
    return jax.tree.map(jnp.copy, found) or None


def init_state(
    task: BaseTask,
    optimizer: optim.Optimizer,
    boxed: Params,
    *,
    seed: int,
    ema: bool,
    mesh: Mesh,
    guard: SpikeGuard | None = None,
    zero1: bool = False,
) -> tuple[Callable[[], State], State]:
    """Returns the function that makes the initial state, and the state's shapes and shardings.

    The function is compiled with the shardings of its outputs, so that a model that is larger than
    the memory of one device never exists on a single device.

    Args:
      boxed: the shapes of the task's parameters, as `tasks.boxed_params` returns them.
      ema: whether the state has a moving average of the parameters.
      guard: the guard against spikes, if there is one.
      zero1: whether the optimizer's state and the average are split over `data` too.
    """

    def state_of(params: Params) -> State:
        return State(
            step=jnp.int32(0),
            seed=jnp.uint32(seed),
            params=params,
            opt_state=optimizer.init(params),
            ema=jax.tree.map(jnp.copy, params) if ema else None,
            bad_steps=jnp.int32(0),
            losses=LossHistory.empty() if guard else None,
            task_state=first_task_state(task, params, seed),
        )

    def make() -> State:
        return state_of(nn.unbox(task.init(random_key(jnp.uint32(seed), Purpose.INIT))))

    shapes = jax.eval_shape(state_of, nn.unbox(boxed))
    shardings = state_shardings(shapes, boxed, mesh, zero1=zero1)
    abstract = jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        shapes,
        shardings,
    )
    compiled = jax.jit(make, out_shardings=shardings)

    def make_on_mesh() -> State:
        with sharding.activate(mesh):
            return compiled()

    return make_on_mesh, abstract


def state_shardings(shapes: State, boxed: Params, mesh: Mesh, *, zero1: bool = False) -> State:
    """Returns the sharding of each array of the state.

    The optimizer's, the average's and the task's copies of a parameter are sharded as the parameter
    is. With `zero1` the optimizer's and the average's are split over `data` too; the task's are
    not, because each step computes with them.
    """
    params = sharding.param_shardings(boxed, mesh)
    copies = sharding.optimizer_shardings(boxed, params, mesh) if zero1 else params
    everywhere: Any = sharding.replicated(mesh)
    return State(
        step=everywhere,
        seed=everywhere,
        params=params,
        opt_state=sharding.shardings_like(shapes.opt_state, shapes.params, copies, mesh),
        ema=copies if shapes.ema is not None else None,
        bad_steps=everywhere,
        losses=jax.tree.map(lambda _: everywhere, shapes.losses),
        task_state=sharding.shardings_like(shapes.task_state, shapes.params, params, mesh),
    )


def make_train_step(
    task: BaseTask,
    optimizer: optim.Optimizer,
    abstract: State,
    mesh: Mesh,
    *,
    accum_steps: int = 1,
    ema_decay: float = 0.0,
    max_skipped_steps: int = 0,
    guard: SpikeGuard | None = None,
    grad_shardings: Params | None = None,
) -> jax.stages.Wrapped:
    """Returns the jitted step `(state, batch) → (state, metrics)`, which reuses the state's memory.

    A step whose loss or gradient is not finite changes nothing but the counters. After more than
    `max_skipped_steps` of them in a row every later update is skipped too, so that the state stays
    the last good one until the loop ends the run. The same holds for steps that `guard` refuses.

    Args:
      accum_steps: the number of micro-batches, whose gradients are summed before the update.
      grad_shardings: the shardings of gradients and updates; None for those of the parameters.
    """
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    grad_shardings = grad_shardings or shardings.params

    def train_step(state: State, batch: Batch) -> tuple[State, dict[str, Array]]:
        task_state = state.task_state or {}
        batch = task.augment(batch, random_key(state.seed, Purpose.AUGMENT, state.step))
        batch = task.add_targets_from(state.params, task_state, batch, state.step)
        key = random_key(state.seed, Purpose.DROPOUT, state.step)

        def loss_and_grads(params: Params) -> tuple[Array, Params]:
            loss, grads = _loss_and_grads(
                task, optimizer.freeze, params, batch, key, accum_steps=accum_steps, mesh=mesh
            )
            # Without this the partitioner may leave gradients whole on every device.
            return loss, jax.lax.with_sharding_constraint(grads, grad_shardings)

        loss, grads = loss_and_grads(state.params)
        if optimizer.sam_rho:
            _, grads = loss_and_grads(optimizer.ascend(state.params, grads))
        grad_norm = optax.tree.norm(grads)
        after = _update(state, grads, optimizer, grad_shardings, ema_decay)
        own = task.next_state(task_state, after.params, batch, state.step) or None

        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        accepted, bad_steps, losses = _judge(state, loss, finite, max_skipped_steps, guard)
        metrics = {"loss": loss, "lr": optimizer.lr(state.step), "grad_norm": grad_norm}
        metrics |= {"bad_steps": bad_steps, **spikes.logged(losses)}
        metrics = _with_own(metrics, task.step_metrics(task_state, batch))
        after = after.replace(task_state=own, bad_steps=bad_steps, losses=losses)
        return _next_state(state, after, accepted), metrics

    return jax.jit(
        train_step,
        in_shardings=(shardings, sharding.batch_sharding(mesh)),
        out_shardings=(shardings, sharding.replicated(mesh)),
        donate_argnums=0,
    )


def _with_own(metrics: dict[str, Array], own: Mapping[str, Array]) -> dict[str, Array]:
    """Returns the metrics of a step with a task's own. Raises `UserError` if they share a name."""
    if taken := sorted(metrics.keys() & own.keys()):
        raise UserError(
            f"the task's step_metrics have {taken[0]!r}, which every step logs; give it another"
            " name"
        )
    return {**metrics, **own}


def _update(
    state: State,
    grads: Params,
    optimizer: optim.Optimizer,
    grad_shardings: Params,
    ema_decay: float,
) -> State:
    """Returns the state with parameters, optimizer state and average after these gradients."""
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params, state.step)
    # With zero1 the new parameters are computed in parts, which the output puts together.
    updates = jax.lax.with_sharding_constraint(updates, grad_shardings)
    params = optax.apply_updates(state.params, updates)
    params = jax.lax.with_sharding_constraint(params, grad_shardings)
    after = state.replace(step=state.step + 1, params=params, opt_state=opt_state)
    if state.ema is None:
        return after
    return after.replace(ema=ema_update(state.ema, params, state.step, ema_decay))


def _next_state(before: State, after: State, accepted: Array) -> State:
    """Returns `after` if the step is accepted, else `before`, with the counters moved on."""
    counters = {name: getattr(after, name) for name in ("step", "bad_steps", "losses")}
    keep = functools.partial(jax.lax.select, accepted)
    # The memory of the losses has its own rule, so both sides have the same.
    return jax.tree.map(keep, after, before.replace(losses=after.losses)).replace(**counters)


def _judge(
    state: State, loss: Array, finite: Array, max_skipped_steps: int, guard: SpikeGuard | None
) -> tuple[Array, Array, LossHistory | None]:
    """Returns whether a step may change the state, and the state's `bad_steps` and `losses`.

    Args:
      finite: whether the loss and the gradient of the step are finite.
    """
    accepted = finite & (state.bad_steps <= max_skipped_steps)
    bad_steps = jnp.where(accepted, 0, state.bad_steps + 1)
    if guard is None:
        return accepted, bad_steps, None
    assert state.losses is not None
    history = guard.before(state.losses, state.step)
    fine = guard.accepts(history, loss)
    accepted &= fine
    return accepted, bad_steps, guard.after(history, loss, fine, accepted)


def _loss_and_grads(
    task: BaseTask,
    freeze: Callable[[Params], Params],
    params: Params,
    batch: Batch,
    key: Array,
    *,
    accum_steps: int,
    mesh: Mesh,
) -> tuple[Array, Params]:
    """Returns the mean loss over the batch and its gradient, one micro-batch at a time.

    Micro-batch i holds the rows i, i + accum_steps, ..., so that every device keeps its own rows;
    consecutive blocks would move them to other devices. Each micro-batch has its own dropout key.
    """
    loss_fn = task.loss_fn_of_parts if accum_steps > 1 and task.needs_whole_batch else task.loss_fn
    value_and_grad = jax.value_and_grad(
        lambda params, batch, key: loss_fn(freeze(params), batch, key), has_aux=True
    )
    where = NamedSharding(mesh, P(None, sharding.BATCH_AXES))

    def split(array: Array) -> Array:
        parts = array.reshape(-1, accum_steps, *array.shape[1:]).swapaxes(0, 1)
        return jax.lax.with_sharding_constraint(parts, where)

    parts = jax.tree.map(split, batch) if accum_steps > 1 else batch
    if accum_steps == 1 or task.needs_whole_batch:
        (loss, count), grads = value_and_grad(params, parts, key)
    else:

        def add(sums: Any, micro: tuple[Batch, Array]) -> tuple[Any, None]:
            part, index = micro
            return jax.tree.map(
                jnp.add, sums, value_and_grad(params, part, jax.random.fold_in(key, index))
            ), None

        zeros = jax.tree.map(jnp.zeros_like, ((jnp.float32(0), jnp.float32(0)), params))
        ((loss, count), grads), _ = jax.lax.scan(add, zeros, (parts, jnp.arange(accum_steps)))
    # A batch may have no terms, such as images without objects. The sum of weights may be below 1.
    count = jnp.where(count > 0, count, 1)
    return loss / count, jax.tree.map(lambda g: g / count, grads)


def make_eval_step(
    task: BaseTask, params: Params, mesh: Mesh
) -> Callable[[Params, Batch, Mapping[str, Array]], tuple[dict[str, Array], dict[str, Array]]]:
    """Returns the jitted `(params, batch, sums) → (sums, rows)`, which adds a batch's statistics.

    Args:
      task: the task that defines `eval_sums` and `eval_rows`.
      params: shapes and shardings of `inference_params`, with those of `precompute`.
      mesh: the devices.

    Returns:
      The step. Its `rows` are the arrays that the task's metrics need of each example, on every
      device, with the batch's `mask`.
    """
    everywhere = sharding.replicated(mesh)
    eval_sums = jax.jit(task.eval_sums, inline=True)  # Who asks for its shapes traces it once.

    def eval_step(
        params: Params, batch: Batch, sums: Mapping[str, Array]
    ) -> tuple[dict[str, Array], dict[str, Array]]:
        rows = task.eval_rows(params, batch)
        rows = {**rows, "mask": batch["mask"]} if rows else {}
        return jax.tree.map(jnp.add, dict(sums), eval_sums(params, batch)), rows

    shardings = jax.tree.map(lambda leaf: leaf.sharding, params)
    return jax.jit(
        eval_step,
        in_shardings=(shardings, sharding.batch_sharding(mesh), everywhere),
        out_shardings=everywhere,
        donate_argnums=2,
    )
