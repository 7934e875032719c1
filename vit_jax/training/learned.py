"""The classes and the statistics that a checkpoint was trained for, compared with a task's."""

import dataclasses
import logging
from collections.abc import Sequence

import numpy as np

from vit_jax.checkpoints import input_spec
from vit_jax.errors import UserError
from vit_jax.tasks import BaseTask
from vit_jax.training.class_names import difference, moved, warn_of_other_names
from vit_jax.training.workdir import Workdir


@dataclasses.dataclass(frozen=True)
class Learned:
    """The names of the classes of a checkpoint.

    Attributes:
      place: the checkpoint.
      names: a name for each class; empty if nothing tells them.
      is_run: the checkpoint is of a run of this package. Then a class of the same data has the same
        name. Other libraries may have different words for it.
    """

    place: str
    names: tuple[str, ...]
    is_run: bool

    @classmethod
    def of(cls, checkpoint: str) -> "Learned":
        """Returns the classes of a checkpoint of any format; without names if there is none.

        Raises:
          UserError: a file that lies beside the checkpoint is broken.
        """
        run = Workdir.containing(checkpoint) if checkpoint else None
        if run:
            return cls(checkpoint, run.read_class_names(), True)
        return cls(checkpoint, input_spec.class_names(checkpoint) if checkpoint else (), False)

    def change(self, names: Sequence[str]) -> str:
        """Returns the first class whose number means another class in `names`, "" if none does.

        A word of another library that `names` does not have is only warned of, as is a number of
        classes other than its own passed over: the shapes of the head tell that.
        """
        if self.is_run:
            return difference(self.names, names) if self.names and names else ""
        if len(self.names) != len(names):
            return ""
        if pair := moved(self.names, names):
            return f"class {pair[0]} was {pair[1]!r} and is now {pair[2]!r}"
        warn_of_other_names(self.place, self.names, "config.data", names)
        return ""


def warn_of_other_statistics(task: BaseTask, checkpoint: str) -> None:
    """Warns if a task normalizes images in another way than the checkpoint specifies."""
    mean = getattr(task, "mean", None)
    try:
        told = input_spec.read(checkpoint)
    except UserError as error:  # Preprocessing that only its own library has hinders no training.
        logging.warning("config.task.mean and std cannot be compared: %s", error)
        return
    if told is None or mean is None or task.image_spec.dtype != np.uint8:
        return
    if not told.has_statistics(mean, task.std):
        logging.warning(
            "config.task.mean=%s and std=%s are not what %s was trained with: mean %s, std %s",
            list(mean), list(task.std), checkpoint, list(told.mean), list(told.std),
        )  # fmt: skip
