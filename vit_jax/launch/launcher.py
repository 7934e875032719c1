"""The actions of `./run.sh tpu`, which every backend has."""

import abc
import dataclasses
import re
import time
from collections.abc import Callable, Sequence
from typing import ClassVar

from vit_jax.errors import UserError, program
from vit_jax.launch.shell import Shell
from vit_jax.launch.slices import Slices

RESTARTS = 20
"""The number of times in a row that a host restarts a run without the launcher."""

MAX_UNREACHED = 20
"""The number of polls in a row that may fail before the launcher gives up; the run continues."""


LONGEST_PAUSE = 300.0
"""The most seconds between two requests for slices that there is no capacity for."""

NO_CAPACITY = re.compile(
    r"no more capacity|stockout|ZONE_RESOURCE_POOL_EXHAUSTED|does not have enough resources"
    r"|currently unavailable in the .*zone",
    re.IGNORECASE,
)

PERMANENT = re.compile(
    r"PERMISSION_DENIED|UNAUTHENTICATED|INVALID_ARGUMENT|Required '.*' permission|Invalid value"
    r"|unrecognized arguments|is not installed",
    re.IGNORECASE,
)
"""Errors that every further request would meet as well."""


class Unusable(UserError):
    """There are no slices, and none will be created, so another poll would not help."""


@dataclasses.dataclass
class Launcher(abc.ABC):
    """Creates, uses and deletes the slices of one name.

    Attributes:
      poll: the seconds between two polls of the state.
      copies_code: whether the hosts get the code of this checkout. Otherwise an image holds it.
    """

    copies_code: ClassVar[bool] = True

    slices: Slices
    shell: Shell
    poll: float
    _told: dict[str, str] = dataclasses.field(default_factory=dict, init=False)

    @abc.abstractmethod
    def create(self) -> None:
        """Requests the slices, and waits until they are ready."""

    @abc.abstractmethod
    def train(self, arguments: Sequence[str], workdir: str, pin: tuple[str, str] | None) -> int:
        """Starts a run, and restarts it until it is done or has failed; returns its exit code.

        Args:
          arguments: the arguments of the command `train`.
          workdir: the directory of the run.
          pin: repository and commit; with None the working tree is copied.
        """

    @abc.abstractmethod
    def logs(self, number: int, worker: str) -> None:
        """Shows the log of one host of a slice until its run ends."""

    @abc.abstractmethod
    def status(self) -> None:
        """Prints the state of the slices and of every host."""

    @abc.abstractmethod
    def stop(self) -> None:
        """Stops the run, which saves its state first; the slices stay."""

    @abc.abstractmethod
    def delete(self) -> None:
        """Deletes the slices; the run's workdir stays."""

    @abc.abstractmethod
    def check(self, workdir: str) -> int:
        """Measures hosts and chips, prints one table; returns 0 if everything is well, else 1.

        workdir: the bucket to measure, too; "" for none.
        """

    def render(self, arguments: Sequence[str]) -> str:
        """Returns the manifest of a run, for backends that have one."""
        raise UserError(
            f"tpu render: --backend={self.slices.backend} has no manifest; write --backend=gke"
        )

    def request(self, take: Callable[[], None]) -> None:
        """Calls `take`, which requests capacity, again with longer pauses while there is none."""
        pause = self.poll
        while True:
            try:
                return take()
            except UserError as error:
                if not NO_CAPACITY.search(str(error)):
                    raise
                self.shell.say(f"{error}; trying again in {pause:.0f} s")
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    def look_until(self, look: Callable[[], int | None]) -> int:
        """Polls `look` until it has a result; it may fail while hosts are being taken away."""
        unreached = 0
        while True:
            try:
                found = look()
                unreached = 0
            except Unusable:
                raise
            except UserError as error:
                unreached += 1
                if unreached > MAX_UNREACHED:
                    raise
                self.shell.say(f"{error}; looking again")
                found = None
            if found is not None:
                return found
            time.sleep(self.poll)

    def tell(self, who: str, text: str) -> None:
        """Prints `text` about `who` if it differs from the last text about it."""
        if text and text != self._told.get(who):
            self.shell.say(f"{who}: {text}")
            self._told[who] = text

    def costs(self) -> str:
        """Returns the reminder that slices cost until they are deleted."""
        return f"; it is there, and costs, until {program()} tpu delete {self.slices.name}"


def on_one_line(arguments: Sequence[str]) -> str:
    """Returns the arguments of a run on one line, in the form that `host.sh` stores."""
    escaped = (argument.replace("\\", "\\\\").replace(" ", "\\ ") for argument in arguments)
    return " ".join(escaped).replace("\n", "\\n").replace("\r", "\\r")
