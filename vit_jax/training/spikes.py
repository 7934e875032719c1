"""Steps whose loss jumps are found and skipped on the device, so that the host never waits."""

import dataclasses
import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from vit_jax.types import Array


@flax.struct.dataclass
class LossHistory:
    """The memory of the guard, as a part of the training state.

    Attributes:
      mean: float32, the loss averaged over about the last `window` accepted steps.
      accepted: int32, the number of accepted steps.
      in_a_row: int32, the number of spikes since the last accepted step.
      total: int32, the number of spikes in the whole run.
    """

    mean: Array
    accepted: Array
    in_a_row: Array
    total: Array

    @classmethod
    def empty(cls) -> "LossHistory":
        return cls(jnp.float32(0), jnp.int32(0), jnp.int32(0), jnp.int32(0))


@dataclasses.dataclass(frozen=True)
class SpikeGuard:
    """Skips steps whose loss exceeds `factor` times its recent average over `window` steps.

    Above a negative average, such as that of a log-likelihood, the limit lies as far as above a
    positive one: the average plus `factor - 1` times its absolute value.

    Chowdhery et al. (2022, PaLM, section 5.1) met such spikes in large runs and skipped the batches
    around them by hand. No step is skipped before `window` steps have been accepted. After more
    than `max_skipped` spikes in a row every later step is skipped too, until the loop ends the run:
    the loss has then changed for good, and no step would ever be accepted again.

    Attributes:
      start: the number of steps before those that the guard judges. Another stage of the run may
        have losses of another size, so the history starts anew after it.
    """

    factor: float
    window: int
    max_skipped: int
    start: int = 0

    @classmethod
    def of(cls, config: ConfigDict, start: int = 0) -> "SpikeGuard | None":
        """Returns the guard that `config.spikes` describes, or None if it is off."""
        keys = config.spikes
        return cls(keys.factor, keys.window, keys.max_skipped, start) if keys.factor else None

    def before(self, history: LossHistory, step: Array) -> LossHistory:
        """Returns the history by which a step is judged, which is new after `start` steps.

        step: the number of steps before it.
        """
        if not self.start:
            return history
        new = dataclasses.replace(LossHistory.empty(), total=history.total)
        return jax.tree.map(functools.partial(jnp.where, step == self.start), new, history)

    def accepts(self, history: LossHistory, loss: Array) -> Array:
        """Returns a boolean: whether a step with this loss may change the state."""
        mean = history.mean
        limit = mean + (self.factor - 1) * jnp.abs(mean)
        spiked = (history.accepted >= self.window) & (loss > limit)
        return ~spiked & (history.in_a_row <= self.max_skipped)

    def after(self, history: LossHistory, loss: Array, fine: Array, used: Array) -> LossHistory:
        """Returns the history after a step.

        A step that was skipped for another reason, because it was not finite, is not a spike.

        Args:
          fine: the result of `accepts`.
          used: whether the step changed the state.
        """
        weight = 1 / jnp.minimum(history.accepted + 1, self.window)
        mean = jnp.where(used, history.mean + weight * (loss - history.mean), history.mean)
        spike = ~fine & jnp.isfinite(loss)
        return LossHistory(
            mean=mean,
            accepted=history.accepted + used,
            in_a_row=jnp.where(used, 0, history.in_a_row + spike),
            total=history.total + spike,
        )


def logged(history: LossHistory | None) -> dict[str, Any]:
    """Returns the values of a history that are logged; none if the guard is off."""
    if history is None:
        return {}
    return {"loss_mean": history.mean, "spikes": history.in_a_row, "spikes_total": history.total}
