"""Objects of the user's own that are told what a run does: `vit_jax.train(..., callbacks=[...])`.

A callback has any of these methods:

    on_step(step, metrics)      a row of a training step was logged, as `config.log.every` says
    on_evaluate(step, metrics)  all splits were evaluated; `{"val/accuracy": 0.9, ...}`
    on_save(step)               a checkpoint was handed to the thread that writes it
    on_end(outcome)             the run is finished; what `vit_jax.train` returns

`metrics` are plain floats. Those of `on_step` have the names of the log, such as `train/loss`. A
row arrives while the device already runs the next step, so that callbacks do not delay it.

Every process of a run calls its callbacks. An exception ends the run, which can be resumed from its
last checkpoint.
"""

from collections.abc import Sequence
from typing import Any

from vit_jax.errors import UserError, quoted
from vit_jax.plugins import check_known

EVENTS = ("on_step", "on_evaluate", "on_save", "on_end")


class Callbacks:
    """Calls the methods that callbacks have, in the order of the callbacks.

    Raises:
      UserError: an object has none of the methods, or one whose name is misspelled.
    """

    def __init__(self, callbacks: Sequence[Any] = ()):
        for one in callbacks:
            where = f"callback {quoted(one)}"
            found = [name for name in dir(one) if name.startswith("on_")]
            for name in found:
                check_known(name, EVENTS, f"{where}: {name}", "event")
            if not found:
                raise UserError(f"{where} has none of the methods {', '.join(EVENTS)}")
        self._callbacks = tuple(callbacks)

    def __call__(self, event: str, *args: Any) -> None:
        """Calls the method `event` of every callback that has it.

        Each gets its own copy of the metrics, so that what it changes in them reaches nobody.
        """
        for one in self._callbacks:
            method = getattr(one, event, None)
            if method is not None:
                method(*(dict(each) if isinstance(each, dict) else each for each in args))
