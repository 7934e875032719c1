"""Steps whose loss jumps: found on the device, so that the host waits for nothing."""

import dataclasses
from typing import Any

import flax.struct
import jax.numpy as jnp
from ml_collections import ConfigDict

from vit_jax.types import Array


@flax.struct.dataclass
class LossHistory:
    """What the guard remembers; part of the training state.

    mean: float32, loss averaged over about the last `window` steps that were accepted.
    accepted: int32, how many there have been. in_a_row: int32, spikes since the last of them.
    total: int32, spikes of the whole run.
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

    Chowdhery et al. (2022, PaLM, section 5.1) met such spikes in large runs and skipped the batches
    around them by hand. No step is skipped before `window` of them have been seen. After more than
    `max_skipped` in a row every later step is held back too, until the loop notices: the loss has
    then moved for good, and nothing would ever be accepted again.
    """

    factor: float
    window: int
    max_skipped: int

    @classmethod
    def of(cls, config: ConfigDict) -> "SpikeGuard | None":
        """The guard that `config.spikes` describes, None where it is off."""
        keys = config.spikes
        return cls(keys.factor, keys.window, keys.max_skipped) if keys.factor else None

    def accepts(self, history: LossHistory, loss: Array) -> Array:
        """Boolean: whether a step of this loss may change the state."""
        spiked = (history.accepted >= self.window) & (loss > self.factor * history.mean)
        return ~spiked & (history.in_a_row <= self.max_skipped)

    def after(self, history: LossHistory, loss: Array, fine: Array, used: Array) -> LossHistory:
        """The history after a step. fine: whether `accepts` said so; used: and the state changed.

        A step that was skipped for another reason (it was not finite) leaves the history alone.
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
    """What the log shows of a history; nothing where the guard is off."""
    if history is None:
        return {}
    return {"loss_mean": history.mean, "spikes": history.in_a_row, "spikes_total": history.total}
