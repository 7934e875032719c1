"""The hosts of a fleet: runs `host.sh` there, and does not wait for those that are gone."""

import dataclasses
import re
import shlex
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from vit_jax.errors import UserError
from vit_jax.launch.archive import REPOSITORY
from vit_jax.launch.fleet import Fleet
from vit_jax.launch.shell import CREATE_SECONDS, HOST_SECONDS, Command, Each, Failed, Shell
from vit_jax.launch.slices import ABSENT, LOST, STOPPED

HOST_SCRIPT = Path(__file__).parent / "host.sh"

SHORTEST_POLL = 1.0
"""The least seconds between two looks at the state of slices whose hosts are busy."""

ALL = "every host"
"""Stands for the names of all hosts where none answers."""

STOP_SECONDS = 900.0
"""The time limit of a stop. `host.sh` kills a run that has not ended after 600 s."""


class Gone(Failed):
    """The slices, or some of their hosts, have gone away during a call."""


@dataclasses.dataclass(frozen=True)
class HostState:
    """The state of a run on one host: none, running, or ended with an exit code."""

    host: str
    kind: str
    code: int | None
    last_line: str

    @classmethod
    def parse(cls, line: str) -> "HostState | None":
        """Parses a line of `host.sh NAME state`; returns None for other lines such as greetings."""
        found = re.fullmatch(r"(\S+) (?:(none|running)|(ended) (\d+))(?: (.*))?", line)
        if not found:
            return None
        host, going, ended, code, text = found.groups()
        return cls(host, going or ended, int(code) if code else None, text or "")


@dataclasses.dataclass
class Hosts:
    """Reaches the hosts of all slices of a fleet.

    Attributes:
      poll: the seconds between two looks at the state of the slices during a call.
      known: the names of the hosts that have answered.
    """

    fleet: Fleet
    shell: Shell
    poll: float
    known: set[str] = dataclasses.field(default_factory=set, init=False)
    _silent: list[str] = dataclasses.field(default_factory=list, init=False)

    @property
    def name(self) -> str:
        return self.fleet.slices.name

    @property
    def count(self) -> int:
        """Returns the number of hosts of all slices; 0 if it is not known."""
        return self.fleet.slices.hosts * self.fleet.slices.slices

    def reach(
        self, commands: Sequence[Command | Each], pretend: str = "", seconds: float = HOST_SECONDS
    ) -> str:
        """Runs commands that reach hosts at the same time; returns their output.

        Every long call goes through here. Meanwhile it asks for the state of the slices, and in a
        call that may last longer than an answer also whether all hosts answer: a host that has
        vanished may hold its connection for as long as the call may take.

        Raises:
          Gone: the slices were taken away, stopped or deleted, or a host does not answer twice in
            a row. No command is running any more.
          Failed: a command failed, or took longer than its time limit.
        """
        self._silent = []

        def look() -> None:
            self._check_slices()
            if seconds > HOST_SECONDS:
                self._check_answers()

        return self.shell.ask_all(commands, pretend, seconds, look, max(self.poll, SHORTEST_POLL))

    def _check_slices(self) -> None:
        try:
            state = self.fleet.look(self.shell)
        except UserError as error:  # This says nothing about the slices.
            self.shell.say(f"{error}; looking again")
            return
        if state.kind in (LOST, ABSENT, STOPPED):
            raise Gone(f"{self.name} became {state.told}")

    def _check_answers(self) -> None:
        try:
            _, silent = self.answers()
        except UserError:
            silent = [ALL]
        gone = _in_both(silent, self._silent)
        if gone:
            raise Gone(f"{self.name}: {does_not_answer(gone)}")
        self._silent = silent

    def answers(self) -> tuple[list[HostState], list[str]]:
        """Returns the states of the hosts that answer, and the names of those that do not.

        Raises:
          UserError: no host answers.
        """
        script = self.if_prepared("state", otherwise='echo "$(hostname) none"')
        failed = None
        try:
            told = self.shell.ask_all(
                self._commands(script), f"{self.name} ended 0\n", seconds=HOST_SECONDS
            )
        except Failed as error:
            told, failed = error.output, error
        states = [state for line in told.split("\n") if (state := HostState.parse(line))]
        if failed and not states:
            raise failed
        if not states:
            raise UserError(f"no host of {self.name} tells its state")
        answered = {state.host for state in states}
        silent = sorted(self.known - answered)
        missing = self.count - len(answered)
        if not silent and missing > 0 and not self.shell.dry_run:
            silent = [f"{missing} of {self.count} hosts"]
        self.known |= answered
        return sorted(states, key=lambda state: state.host), silent

    def everywhere(self, script: str, seconds: float = HOST_SECONDS) -> str:
        """Runs a shell script on all hosts of all slices at the same time; returns its output."""
        return self.reach(self._commands(script), seconds=seconds)

    def _commands(self, script: str) -> list[Command | Each]:
        commands: list[Command | Each] = []
        for number in range(self.fleet.slices.slices):
            commands += self.fleet.on_hosts(number, script)
        return commands

    def prepare(self, pin: tuple[str, str] | None = None) -> None:
        """Copies the code to all hosts, and installs it there.

        pin: repository and commit, which the hosts clone; with None the working tree is copied.
        """
        with tempfile.TemporaryDirectory(prefix="vit_jax_") as folder:
            files = [str(HOST_SCRIPT)]
            if not pin:
                tar = str(Path(folder) / f"{self.name}.tgz")
                files.append(tar)
                # What a dry run prints works in any folder and for any Python.
                python = ["env", f"PYTHONPATH={REPOSITORY}", sys.executable]
                self.shell.run([*python, "-m", "vit_jax.launch.archive", tar], CREATE_SECONDS)
            commands: list[Command | Each] = []
            for number in range(self.fleet.slices.slices):
                commands += self.fleet.copy(number, files)
            self.reach(commands, seconds=CREATE_SECONDS)
        self.everywhere(self.script("prepare", *(pin or ())), CREATE_SECONDS)

    def start(self, arguments: Sequence[str]) -> None:
        """Starts a run with these arguments on all hosts."""
        commands: list[Command | Each] = []
        for number, found in enumerate(self.fleet.environments(self.shell)):
            variables = [f"{name}={value}" for name, value in found.items()]
            script = shlex.join(["env", *variables]) + " " if variables else ""
            commands += self.fleet.on_hosts(number, script + self.script("start", *arguments))
        self.reach(commands)

    def stop(self) -> None:
        """Stops the run on all hosts, which saves its state first."""
        self.everywhere(self.if_prepared("stop"), STOP_SECONDS)

    def script(self, action: str, *arguments: str) -> str:
        """Returns the command line that runs an action of `host.sh`."""
        return shlex.join(["bash", "host.sh", self.name, action, *arguments])

    def if_prepared(self, action: str, otherwise: str = "true") -> str:
        """Returns a script that also works on new hosts, which do not have `host.sh`."""
        return f"if [ -f host.sh ]; then {self.script(action)}; else {otherwise}; fi"


def _in_both(now: list[str], before: list[str]) -> list[str]:
    if ALL in now or ALL in before:
        return before if ALL in now else now
    return [host for host in now if host in before]


def does_not_answer(silent: Sequence[str]) -> str:
    """Returns the words that these hosts do not answer."""
    if silent == [ALL]:
        return "no host answers"
    several = len(silent) > 1 or silent[0].endswith(" hosts")
    return f"{', '.join(silent)} {'do' if several else 'does'} not answer"
