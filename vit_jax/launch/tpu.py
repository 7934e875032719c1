"""Starts runs on Cloud TPU slices from a local machine, and restarts them until they are done.

The flags of the command `tpu` are in `vit_jax/cli/commands/tpu.py`. The hosts run `host.sh`, which
is copied to them with the code.
"""

import dataclasses
import io
import re
import shlex
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from vit_jax.errors import Interrupted, UserError, program
from vit_jax.launch import gcloud
from vit_jax.launch.gcloud import ABSENT, COMING, LOST, READY, Gcloud, Slices
from vit_jax.version import COMMIT_FILE, commit_of

HOST_SCRIPT = Path(__file__).parent / "host.sh"
REPOSITORY = Path(__file__).parent.parent.parent

RESTARTS = 20
"""The number of times in a row that a host restarts a run without the launcher."""

MAX_UNREACHED = 20
"""The number of polls in a row that may fail before the launcher gives up; the run continues."""


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


class _Unusable(UserError):
    """There are no slices, and none will be created, so another poll would not help."""


@dataclasses.dataclass
class Launcher:
    """Creates, uses and deletes the slices of one name.

    Attributes:
      poll: the seconds between two polls of the state.
    """

    slices: Slices
    cloud: Gcloud
    poll: float = 30.0
    _told: dict[str, str] = dataclasses.field(default_factory=dict, init=False)
    _begun: bool = dataclasses.field(default=False, init=False)

    def create(self) -> None:
        """Requests the slices, and waits until they are ready.

        Raises:
          UserError: other slices of that name exist, or these cannot be created.
        """
        if not self.cloud.dry_run:
            known = gcloud.recall(self.slices.name)
            if known not in (None, self.slices) and self.cloud.state(known) != ABSENT:
                raise UserError(
                    f"there is a {known.name} of type {known.type} already; {program()} tpu delete"
                    " it, or choose another name"
                )
            gcloud.remember(self.slices)
        self.cloud.run(self.slices.create())
        self._look_until(lambda: 0 if self._is_ready() else None)

    def train(self, arguments: Sequence[str], workdir: str, pin: tuple[str, str] | None) -> int:
        """Starts the run on all hosts, and restarts it until it is done or has failed.

        Args:
          arguments: the arguments of the command `train`.
          workdir: the directory of the run.
          pin: repository and commit; with None the working tree is copied.

        Returns:
          The run's exit code.

        Raises:
          UserError: the slices do not exist, or are deleted during the run; another run occupies
            them; more than `MAX_UNREACHED` polls in a row have failed.
        """
        self._look_until(lambda: 0 if self._is_ready(replace=True) else None)
        self._begun = not self.cloud.dry_run and self._is_going(arguments)
        if not self._begun:
            self._begin(arguments, workdir, pin)

        def look() -> int | None:
            if not self._is_ready(replace=True):
                return None
            if not self._begun:
                self._begin(arguments, workdir, pin)
            return self._look_at_hosts()

        return self._look_until(look)

    def _look_until(self, look: Callable[[], int | None]) -> int:
        """Polls `look` until it has a result; it may fail while hosts are being taken away."""
        unreached = 0
        while True:
            try:
                found = look()
                unreached = 0
            except _Unusable:
                raise
            except UserError as error:
                unreached += 1
                if unreached > MAX_UNREACHED:
                    raise
                self.cloud.say(f"{error}; looking again")
                found = None
            if found is not None:
                return found
            time.sleep(self.poll)

    def _is_ready(self, *, replace: bool = False) -> bool:
        """Returns whether the slices are ready; prints a line when their state changes.

        replace: creates slices again that were taken away.

        Raises:
          _Unusable: the slices do not exist and are not created.
        """
        state = self.cloud.state(self.slices)
        if replace and state in LOST:
            self._replace()
            return False
        if state not in (*READY, *COMING):
            name = self.slices.name
            delete = "" if state == ABSENT else f"{program()} tpu delete {name}, then "
            raise _Unusable(f"{name} is {state}; {delete}{program()} tpu create it first")
        self._tell(self.slices.name, state)
        return state in READY

    def _tell(self, who: str, text: str) -> None:
        """Prints `text` about `who` if it differs from the last text about it."""
        if text and text != self._told.get(who):
            self.cloud.say(f"{who}: {text}")
            self._told[who] = text

    def _replace(self) -> None:
        """Creates slices again that were taken away, and waits as long as there is no capacity."""
        self.cloud.say(f"{self.slices.name} was preempted; creating it again")
        self._begun = False
        while True:
            try:
                state = self.cloud.state(self.slices)
                if state in (*READY, *COMING):
                    return
                made = self.slices.create() if state == ABSENT else self.slices.delete()
                self.cloud.run(made)
            except UserError as error:
                self.cloud.say(f"{error}; trying again")
                time.sleep(self.poll)

    def _look_at_hosts(self) -> int | None:
        """Returns the run's exit code once it has ended for good."""
        states = self.states()
        if any(state.kind == "none" for state in states):  # A host was restarted or replaced.
            self.stop()
            self._begun = False
            return None
        code = self._verdict(states)
        if code is None:
            self._tell(states[0].host, states[0].last_line)
        return code

    def _is_going(self, arguments: Sequence[str]) -> bool:
        """Returns whether this run is in progress already.

        Raises:
          UserError: another run is in progress.
        """
        if not any(state.kind == "running" for state in self.states()):
            return False
        told = self.cloud.everywhere(self.slices, self._script_if_prepared("arguments"))
        others = set(told.split("\n")) - {on_one_line(arguments), ""}
        if others:
            raise UserError(
                f"another run is going on {self.slices.name}: {others.pop()};"
                f" {program()} tpu stop {self.slices.name} lets it save and end"
            )
        return True

    def stop(self) -> None:
        """Stops the run on all hosts, which saves its state first; the slices stay."""
        self.cloud.everywhere(self.slices, self._script_if_prepared("stop"))

    def _begin(self, arguments: Sequence[str], workdir: str, pin: tuple[str, str] | None) -> None:
        name = self.slices.name
        if pin:
            self.cloud.copy(self.slices, [str(HOST_SCRIPT)])
            self._on_hosts("prepare", *pin)
        else:
            with tempfile.TemporaryDirectory() as folder:
                tar = Path(folder) / f"{name}.tgz"
                if not self.cloud.dry_run:
                    pack(REPOSITORY, tar)
                self.cloud.copy(self.slices, [str(HOST_SCRIPT), str(tar)])
            self._on_hosts("prepare")
        self._on_hosts("check", *([workdir] if workdir.startswith("gs://") else []))
        self._on_hosts("start", *arguments)
        self._begun = True

    def _on_hosts(self, action: str, *arguments: str) -> None:
        self.cloud.everywhere(self.slices, self._script(action, *arguments))

    def _script(self, action: str, *arguments: str) -> str:
        return shlex.join(["bash", "host.sh", self.slices.name, action, *arguments])

    def _script_if_prepared(self, action: str, otherwise: str = "true") -> str:
        """Returns a script that also works on new hosts, which do not have `host.sh`."""
        return f"if [ -f host.sh ]; then {self._script(action)}; else {otherwise}; fi"

    def _verdict(self, states: Sequence[HostState]) -> int | None:
        """Returns the run's exit code once there is one; stops hosts that wait for the others."""
        ended = [state for state in states if state.kind == "ended"]
        if len(ended) == len(states) and all(state.code == 0 for state in states):
            self.cloud.say(f"{self.slices.name}: done{self._still_there()}")
            return 0
        failed = [state for state in ended if state.code]
        if not failed:
            return None
        own = [state for state in failed if state.code != Interrupted.exit_code]
        for state in own or failed:
            self.cloud.say(f"{state.host} ended with {state.code}: {state.last_line}")
        self.stop()
        self.cloud.say(f"{self.slices.name}: ended{self._still_there()}")
        return (own or failed)[0].code

    def _still_there(self) -> str:
        return f"; it is there, and costs, until {program()} tpu delete {self.slices.name}"

    def states(self) -> list[HostState]:
        """Returns the state of the run on every host, in order of their names.

        Raises:
          UserError: no host answers.
        """
        script = self._script_if_prepared("state", otherwise='echo "$(hostname) none"')
        told = self.cloud.everywhere(self.slices, script, pretend=f"{self.slices.name} ended 0\n")
        states = [state for line in told.split("\n") if (state := HostState.parse(line))]
        if not states:
            raise UserError(f"no host of {self.slices.name} tells its state")
        return sorted(states, key=lambda state: state.host)

    def logs(self, node: str, worker: str) -> None:
        """Shows the log of one host until its run ends."""
        self.cloud.run(self.slices.ssh(node, self._script("logs"), worker))

    def status(self) -> None:
        """Prints the state of the slices and of every host."""
        state = self.cloud.state(self.slices)
        print(f"{self.slices.name}: {state}")
        if state in READY:
            for host in self.states():
                code = "" if host.code is None else f" with {host.code}"
                print(f"{host.host}: {host.kind}{code}  {host.last_line}".rstrip())

    def delete(self) -> None:
        """Deletes the slices; the run's workdir stays."""
        self.cloud.run(self.slices.delete())
        if not self.cloud.dry_run:
            gcloud.forget(self.slices.name)


def on_one_line(arguments: Sequence[str]) -> str:
    """Returns the arguments of a run on one line, in the form that `host.sh` stores."""
    line = " ".join(arguments).replace("\\", "\\\\")
    return line.replace("\n", "\\n").replace("\r", "\\r")


def pack(folder: Path, tar: Path) -> None:
    """Writes the files of a git checkout, with uncommitted changes and a note of the commit.

    Files that git ignores are left out.

    Raises:
      UserError: the package was not installed from a checkout.
    """
    listing = ["git", "-C", str(folder), "ls-files", "-co", "--exclude-standard", "-z"]
    done = subprocess.run(listing, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"{folder} is no git checkout; clone the repository, and use its ./run.sh")
    with tarfile.open(tar, "w:gz") as file:
        for name in filter(None, done.stdout.split("\0")):
            if (folder / name).exists():
                file.add(folder / name, name)
        told = (commit_of(folder) or "").encode()
        note = tarfile.TarInfo(COMMIT_FILE)
        note.size = len(told)
        file.addfile(note, io.BytesIO(told))
