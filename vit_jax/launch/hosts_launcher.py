"""Starts runs on hosts that are reached by ssh, and restarts them until they are done."""

import dataclasses
import time
from collections.abc import Sequence

from vit_jax.errors import DoesNotFit, Interrupted, UserError, program, show
from vit_jax.launch import slices as slices_lib
from vit_jax.launch.fleet import Fleet, Step
from vit_jax.launch.health import CHECK_SECONDS, table
from vit_jax.launch.hosts import ALL, Gone, Hosts, HostState, does_not_answer
from vit_jax.launch.launcher import (
    LONGEST_PAUSE,
    MAX_UNREACHED,
    NO_CAPACITY,
    PERMANENT,
    Launcher,
    Unusable,
    on_one_line,
)
from vit_jax.launch.shell import CREATE_SECONDS, Failed
from vit_jax.launch.slices import ABSENT, COMING, LOST, READY, Slices, State

MAX_ILL = 10
"""The number of polls in a row that find the same illness before slices are created again: a cloud
that calls them unhealthy, or a host that does not answer, while no host's run makes progress."""

MAX_FAILED = 3
"""The number of times that a run may fail on unhealthy slices before these are created again."""

ILL_SECONDS = 1800.0
"""Slices are created again for an illness only after as many polls as fit into this time."""


@dataclasses.dataclass
class HostsLauncher(Launcher):
    """Creates slices of a fleet, and runs on their hosts."""

    fleet: Fleet
    hosts: Hosts = dataclasses.field(init=False)
    _begun: bool = dataclasses.field(default=False, init=False)
    _is_in_doubt: bool = dataclasses.field(default=False, init=False)
    _remembered: Slices | None = dataclasses.field(default=None, init=False)
    _lines: dict[str, str] = dataclasses.field(default_factory=dict, init=False)
    _unhealthy: str = dataclasses.field(default="", init=False)
    _illness: str = dataclasses.field(default="", init=False)
    _ill: int = dataclasses.field(default=0, init=False)
    _failed: int = dataclasses.field(default=0, init=False)

    def __post_init__(self) -> None:
        self.hosts = Hosts(self.fleet, self.shell, self.poll)

    def create(self) -> None:
        """Requests the slices, again while there is no capacity, and waits until they are ready.

        After an interruption, slices that were requested already are waited for.

        Raises:
          UserError: other slices of that name exist, or these cannot be created.
        """
        name = self.slices.name
        if not self.shell.dry_run:
            known = slices_lib.recall(name)
            if known not in (None, self.slices):
                if self._is_there(known):
                    raise slices_lib.taken(known, slices_lib.differing(known, self.slices))
                # A request that failed may have left parts, such as a template, of its own kind.
                self._take(dataclasses.replace(self.fleet, slices=known).delete())
            slices_lib.remember(self.slices)
            if known == self.slices and self._is_there(known):
                self.look_until(lambda: 0 if self._is_ready() else None)
                return
        self.request(lambda: self._take(self.fleet.create()))
        self.look_until(lambda: 0 if self._is_ready() else None)

    def _is_there(self, known: slices_lib.Slices) -> bool:
        if known.backend != self.slices.backend:
            return True
        return dataclasses.replace(self.fleet, slices=known).look(self.shell).kind != ABSENT

    def _take(self, steps: Sequence[Step]) -> None:
        for step in steps:
            self.shell.run(step.command, CREATE_SECONDS, step.tolerate)

    def train(self, arguments: Sequence[str], workdir: str, pin: tuple[str, str] | None) -> int:
        """Starts the run on all hosts, and restarts it until it is done or has failed.

        Raises:
          UserError: the slices do not exist, or are deleted during the run; another run occupies
            them; more than `MAX_UNREACHED` polls in a row have failed.
        """
        if not self.shell.dry_run:
            self._remembered = slices_lib.recall(self.slices.name)
        # A run may be in progress, which an unhealthy slice, or a silent host, does not end.
        self._begun = not self.shell.dry_run
        self.look_until(
            lambda: 0 if self._is_ready(replace=True) and self._knows(arguments) else None
        )
        if not self._begun and not self._unhealthy:
            self._begins(arguments, workdir, pin)

        def look() -> int | None:
            if not self._is_ready(replace=True):
                return None
            if not self._begun and not self._begins(arguments, workdir, pin):
                return None
            return self._look_at_hosts()

        return self.look_until(look)

    def _begins(self, arguments: Sequence[str], workdir: str, pin: tuple[str, str] | None) -> bool:
        """Starts the run on all hosts; returns False if slices or hosts have gone away.

        Raises:
          Failed: a command failed although all hosts answer.
        """
        if self._is_in_doubt:  # Or a host that does not answer would hold every try.
            _, silent = self.hosts.answers()
            self._is_in_doubt = bool(silent)
            if silent:
                self._suffer(self._silence(silent))
                return False
        try:
            self.hosts.prepare(pin)
            bucket = [workdir] if workdir.startswith("gs://") else []
            self.hosts.everywhere(self.hosts.script("check", *bucket))
            self.hosts.start(arguments)
        except Failed as error:
            if not isinstance(error, Gone) and self._is_well():
                raise
            self._is_in_doubt = True
            self.shell.say(f"{error}; looking again")
            return False
        self._begun = True
        return True

    def _is_well(self) -> bool:
        try:
            return self._state().kind == READY and not self.hosts.answers()[1]
        except UserError:
            return False

    def _state(self) -> State:
        return self.fleet.look(self.shell)

    def _is_ready(self, *, replace: bool = False) -> bool:
        """Returns whether the slices are ready; prints a line when their state changes.

        replace: creates slices again that were taken away, or stay unhealthy before the run begins.

        Raises:
          Unusable: the slices do not exist and are not created.
        """
        state, name = self._state(), self.slices.name
        if replace and state.kind == LOST:
            self._replace(f"{name} was preempted")
            return False
        if state.kind not in (READY, COMING):
            raise Unusable(f"{name} is {state.told}; {self._way_out(state)}")
        self.tell(name, f"{state.told}, {state.illness}" if state.illness else state.told)
        self._unhealthy = f"{name} is {state.illness}" if state.illness else ""
        if replace and self._unhealthy and not self._begun:
            self._suffer(self._unhealthy)
            return False
        return state.kind == READY

    def _way_out(self, state: State) -> str:
        create = f"{program()} tpu create it first"
        if state.kind == ABSENT:
            return create
        again = self.fleet.start_again()
        if state.kind != LOST and again:
            return f"{again} starts it"
        return f"{program()} tpu delete {self.slices.name}, then {create}"

    def _suffer(self, illness: str) -> None:
        """Counts how often in a row an illness was found, and replaces slices that do not heal."""
        self._ill = self._ill + 1 if illness == self._illness else 1
        self._illness = illness
        polls = ILL_SECONDS / self.poll if self.poll else 0
        if self._ill >= max(MAX_ILL, polls):
            self._ill = 0
            self._replace(illness, is_there=True)

    def _replace(self, reason: str, *, is_there: bool = False) -> None:
        """Creates slices again, and waits as long as there is no capacity.

        is_there: the slices that are there have to be deleted first.

        Raises:
          Unusable: somebody deleted the slices on this machine, or they cannot be created.
        """
        self._check_not_deleted()
        self.shell.say(f"{reason}; creating it again")
        self._begun = self._is_in_doubt = False
        self.hosts.known.clear()
        wanted, pause, failures = is_there, self.poll, 0
        while True:
            self._check_not_deleted()
            try:
                state = self._state()
                if state.kind in (READY, COMING) and not wanted:
                    return
                if state.kind == ABSENT:
                    self._take(self.fleet.create())
                    wanted = False
                elif state.kind == COMING:  # Such as DELETING.
                    time.sleep(self.poll)
                else:
                    self._take(self.fleet.delete())
                    wanted = True
            except UserError as error:
                failures = 0 if NO_CAPACITY.search(str(error)) else failures + 1
                permanent = isinstance(error, Unusable) or PERMANENT.search(str(error))
                if failures > MAX_UNREACHED or permanent:
                    raise Unusable(str(error)) from error
                self.shell.say(f"{error}; trying again")
                time.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE)

    def _check_not_deleted(self) -> None:
        """Raises `Unusable` if the slices were deleted on this machine during the run."""
        name = self.slices.name
        if self._remembered is not None and slices_lib.recall(name) != self._remembered:
            raise Unusable(f"{name} was deleted; {program()} tpu create it first")

    def _look_at_hosts(self) -> int | None:
        """Returns the run's exit code once it has ended for good."""
        try:
            states, silent = self.hosts.answers()
        except UserError:
            if not self._unhealthy:
                raise
            states, silent = [], [ALL]
        illness = self._unhealthy
        if silent:
            illness = self._silence(silent)
        if self._is_progress(states) or not illness:
            self._illness = illness = ""
        if silent:
            if illness:
                self._suffer(illness)
            return None
        if any(state.kind == "none" for state in states):  # A host was restarted or replaced.
            self.stop()
            self._begun = False
            return None
        code = self._verdict(states)
        if code is None:
            self.tell(states[0].host, states[0].last_line)
            if illness:
                self._suffer(illness)
        elif self._unhealthy and _may_be_its_fault(code, states):
            self._fail_on_unhealthy()
            return None
        return code

    def _fail_on_unhealthy(self) -> None:
        """Lets a run begin again once its slices are healthy; replaces those that fail it often."""
        self._failed, self._begun = (self._failed + 1) % MAX_FAILED, False
        if self._failed:
            self.shell.say(f"{self._unhealthy}; the run begins again once it is healthy")
        else:
            self._replace(self._unhealthy, is_there=True)

    def _is_progress(self, states: Sequence[HostState]) -> bool:
        """Returns whether a host has written another line since the last poll."""
        before, self._lines = self._lines, {state.host: state.last_line for state in states}
        return any(line != before.get(host) for host, line in self._lines.items())

    def _knows(self, arguments: Sequence[str]) -> bool:
        """Returns False while hosts that do not answer hide whether this run is in progress.

        Raises:
          Unusable: another run is in progress.
        """
        if not self._begun:
            return True
        states, silent = self.hosts.answers()
        if not any(state.kind == "running" for state in states):
            self._begun = bool(silent)
            if silent:
                self._suffer(self._silence(silent))
            return not silent
        try:
            told = self.hosts.everywhere(self.hosts.if_prepared("arguments"))
        except Failed as error:
            told = error.output
        others = set(told.split("\n")) - {on_one_line(arguments), ""}
        if others:
            raise Unusable(
                f"another run is going on {self.slices.name}: {others.pop()};"
                f" {program()} tpu stop {self.slices.name} lets it save and end"
            )
        return True

    def _silence(self, silent: Sequence[str]) -> str:
        """Returns the illness that these hosts do not answer, and tells it."""
        told, name = does_not_answer(silent), self.slices.name
        self.tell(f"hosts of {name}", told)
        return f"{name}: {told}"

    def stop(self) -> None:
        """Stops the run on all hosts, which saves its state first; the slices stay."""
        self.hosts.stop()

    def _verdict(self, states: Sequence[HostState]) -> int | None:
        """Returns the run's exit code once there is one; stops hosts that wait for the others."""
        ended = [state for state in states if state.kind == "ended"]
        if len(ended) == len(states) and all(state.code == 0 for state in states):
            self.shell.say(f"{self.slices.name}: done{self.costs()}")
            return 0
        failed = [state for state in ended if state.code]
        if not failed:
            return None
        own = [state for state in failed if state.code != Interrupted.exit_code]
        for state in own or failed:
            self.shell.say(f"{state.host} ended with {state.code}: {state.last_line}")
        self.stop()
        self.shell.say(f"{self.slices.name}: ended{self.costs()}")
        return (own or failed)[0].code

    def logs(self, number: int, worker: str) -> None:
        """Shows the log of one host until its run ends."""
        self.shell.show(self.fleet.on_host(number, worker, self.hosts.script("logs")))

    def status(self) -> None:
        """Prints the state of the slices and of every host."""
        state = self._state()
        states, silent = self.hosts.answers() if state.kind == READY else ([], [])
        if self.shell.dry_run:
            return
        illness = f", {state.illness}" if state.illness else ""
        print(f"{self.slices.name}: {state.told}{illness}")
        for host in states:
            code = "" if host.code is None else f" with {host.code}"
            show(f"{host.host}: {host.kind}{code}  {host.last_line}".rstrip())
        for name in silent:
            print(f"{name}: no answer")

    def check(self, workdir: str) -> int:
        """Measures all hosts and chips, and prints one table."""
        if not self._is_ready():
            raise UserError(f"{self.slices.name} is not ready yet; try again later")
        states, silent = self.hosts.answers()
        if any(state.kind == "running" for state in states):
            name = self.slices.name
            raise UserError(
                f"a run is going on {name}, whose code a check would replace;"
                f" {program()} tpu stop {name} lets it save and end"
            )
        told = ""
        if not silent:
            self.hosts.prepare()
            measure = self.hosts.script("measure", *([workdir] if workdir else []))
            try:
                told = self.hosts.everywhere(measure, CHECK_SECONDS)
            except Failed as error:
                told = error.output
                self.shell.say(str(error))
        if self.shell.dry_run:
            return 0
        text, code = table(told, silent, self.hosts.known, self.slices.shape)
        show(text)
        return code

    def delete(self) -> None:
        """Deletes the slices; the run's workdir stays."""
        if self.shell.dry_run:
            self._take(self.fleet.delete())
            return
        # At first, so that a launcher that watches a run does not create the slices again.
        known = slices_lib.recall(self.slices.name)
        slices_lib.forget(self.slices.name)
        try:
            self._take(self.fleet.delete())
        except BaseException:
            if known:
                slices_lib.remember(known)
            raise


def _may_be_its_fault(code: int, states: Sequence[HostState]) -> bool:
    """Returns whether a slice may be why a run ended: no success, mistake, or `tpu stop`."""
    # A stop reaches the hosts one after another; `start` removes what an earlier one left.
    stopped = any(state.last_line.startswith("stopped: ") for state in states)
    return not stopped and code not in (0, UserError.exit_code, DoesNotFit.exit_code)
