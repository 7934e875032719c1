"""The interface of backends whose hosts are reached by ssh."""

import abc
import dataclasses
from collections.abc import Sequence

from vit_jax.launch.shell import CONNECTIONS, Command, Each, Shell
from vit_jax.launch.slices import Slices, State

SSH_FLAGS = (
    "--ssh-flag=-oConnectTimeout=15",
    "--ssh-flag=-oServerAliveInterval=15",
    "--ssh-flag=-oServerAliveCountMax=3",
)
"""gcloud sets none of these, so that a host that vanishes would hold a connection for ever."""


@dataclasses.dataclass(frozen=True)
class Step:
    """One command of several that create or delete slices.

    Attributes:
      tolerate: texts of errors that do not matter, such as that there is nothing to delete.
    """

    command: Command
    tolerate: Sequence[str] = ()


@dataclasses.dataclass(frozen=True)
class Fleet(abc.ABC):
    """Builds the commands that create, reach and delete the hosts of slices.

    Raises:
      UserError: the backend cannot do what was asked for.
    """

    slices: Slices

    def __post_init__(self) -> None:
        self.slices.refuse("image", "cluster", "location", "namespace")

    @abc.abstractmethod
    def create(self) -> list[Step]:
        """Returns the commands that create the slices."""

    @abc.abstractmethod
    def delete(self) -> list[Step]:
        """Returns the commands that delete the slices and all that was created for them."""

    @abc.abstractmethod
    def look(self, shell: Shell) -> State:
        """Asks for the state of the slices."""

    @abc.abstractmethod
    def on_hosts(self, number: int, script: str) -> list[Command | Each]:
        """Returns commands that run a shell script on all hosts of a slice."""

    @abc.abstractmethod
    def on_host(self, number: int, worker: str, script: str) -> Command | Each:
        """Returns the command that runs a script on one host of a slice."""

    @abc.abstractmethod
    def copy(self, number: int, files: Sequence[str]) -> list[Command | Each]:
        """Returns commands that copy local files to the home folders of a slice's hosts."""

    def environments(self, shell: Shell) -> list[dict[str, str]]:
        """Returns, for each slice, the variables by which its processes find the other slices."""
        return [{} for _ in self.slices.nodes]

    def start_again(self) -> str:
        """Returns the command that starts slices which somebody has stopped; "" for none."""
        return ""


def ranges(hosts: int) -> list[str]:
    """Returns values of `--worker`, each for at most `CONNECTIONS` hosts."""
    if hosts <= CONNECTIONS:
        return ["all"]
    firsts = range(0, hosts, CONNECTIONS)
    lasts = [min(first + CONNECTIONS, hosts) - 1 for first in firsts]
    return [
        str(first) if first == last else f"{first}-{last}"
        for first, last in zip(firsts, lasts, strict=True)
    ]
