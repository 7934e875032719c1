"""Runs the commands of a launcher with a time limit each, or prints them."""

import contextlib
import dataclasses
import functools
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait

from vit_jax.errors import UserError, show

Command = list[str]

CALL_SECONDS = 120.0
"""The time limit of a command that asks for, or changes, a state."""

CREATE_SECONDS = 3600.0
"""The time limit of a command that creates slices, or copies files to them, and waits for it."""

HOST_SECONDS = 90.0
"""The time limit for hosts that are asked for their state."""

SILENCE_SECONDS = 50.0
"""A launcher that has said nothing for this long says what it waits for."""

CONNECTIONS = 100
"""The most hosts that are reached at once: gcloud warns of failures beyond (its tpu_vm/ssh.py)."""

_INSTALL = {
    "gcloud": "https://cloud.google.com/sdk/docs/install",
    "kubectl": "https://kubernetes.io/docs/tasks/tools",
}


@dataclasses.dataclass(frozen=True)
class Each:
    """A command for every host of a list, which another command prints.

    Attributes:
      listing: the command that prints the names of the hosts, one a line.
      command: returns the command for the host of this name.
    """

    listing: Command
    command: Callable[[str], Command]

    def text(self) -> str:
        """Returns the loop of a shell that runs the commands at the same time."""
        command = as_text(self.command(_variable("HOST")))
        return f"for HOST in $({as_text(self.listing)}); do {command} & done; wait"


class Failed(UserError):
    """A command failed, or took longer than its time limit.

    Attributes:
      output: what it had printed by then, such as the answers of the hosts that were reached.
    """

    def __init__(self, message: str, output: str = ""):
        super().__init__(message)
        self.output = output


class Shell:
    """Runs commands, or only prints them (`dry_run`).

    Raises:
      UserError: a program is not installed, or a command failed; the message has its last line.
    """

    def __init__(self, *, dry_run: bool = False):
        self.dry_run = dry_run
        self._said = time.monotonic()
        self._running: dict[subprocess.Popen, str] = {}

    def run(
        self, command: Command, seconds: float | None = CALL_SECONDS, tolerate: Sequence[str] = ()
    ) -> None:
        """Runs `command` and shows its output.

        Args:
          seconds: the time limit; None for none.
          tolerate: texts of errors that do not matter, such as that something exists already.
        """
        if self.dry_run:
            print(as_text(command))
            return
        code, _, errors = self._call(command, seconds, capture=False)
        if code and not any(text in errors for text in tolerate):
            raise Failed(f"{shlex.join(command[:5])} failed: {last_line(errors)}")

    def show(self, command: Command | Each) -> None:
        """Runs a command without a time limit, and shows its output as it comes."""
        if self.dry_run:
            print(as_text(command))
            return
        shown = (functools.partial(self.run, one, None) for one in self._listed([command]))
        self._together(list(shown))

    def ask(
        self, command: Command, pretend: str = "", seconds: float = CALL_SECONDS, stdin: str = ""
    ) -> str:
        """Returns the output of `command`, or `pretend` in a dry run.

        stdin: the text that the command reads.
        """
        if self.dry_run:
            print(_with_text(command, stdin))
            return pretend
        code, output, errors = self._call(command, seconds, capture=True, stdin=stdin)
        if code:
            raise Failed(f"{shlex.join(command[:5])} failed: {last_line(errors)}", output)
        return output

    def ask_all(
        self,
        commands: Sequence[Command | Each],
        pretend: str = "",
        seconds: float = CALL_SECONDS,
        look: Callable[[], None] = lambda: None,
        every: float | None = None,
    ) -> str:
        """Runs commands at the same time; returns the outputs one after the other.

        Args:
          look: is called every `every` seconds meanwhile, and may raise `Failed`, which ends the
            commands.

        Raises:
          Failed: a command failed, or took too long, or `look` has raised it; its `output` is that
            of all commands.
        """
        if self.dry_run:
            for command in commands:
                print(as_text(command))
            return pretend * len(commands)
        return self._gather(list(self._listed(commands)), seconds, look, every)

    def ask_first(self, name: str, command: Command | Each) -> str:
        """Returns the first line of the output of `command`; "" if it says nothing.

        A dry run prints an assignment to the variable `name` of the shell, and returns a mark that
        stands for this variable in further commands.
        """
        if self.dry_run:
            print(f"{name}=$({{ {as_text(command)}; }} | head -n 1)")
            return _variable(name)
        return (self.ask_all([command]).strip().splitlines() or [""])[0]

    def _listed(self, commands: Sequence[Command | Each]) -> Iterator[Command]:
        for command in commands:
            if isinstance(command, Each):
                yield from map(command.command, self.ask(command.listing).split())
            else:
                yield command

    def _gather(
        self,
        commands: Sequence[Command],
        seconds: float,
        look: Callable[[], None],
        every: float | None,
    ) -> str:
        outputs, errors = [""] * len(commands), []

        def ask(number: int) -> None:
            try:
                outputs[number] = self.ask(commands[number], seconds=seconds)
            except UserError as error:
                outputs[number] = getattr(error, "output", "")
                errors.append(error)

        tasks = [functools.partial(ask, number) for number in range(len(commands))]
        try:
            self._together(tasks, look, every)
        except Failed as error:
            error.output = "".join(outputs)
            raise
        if errors:
            raise Failed(str(errors[0]), "".join(outputs)) from errors[0]
        return "".join(outputs)

    def _together(
        self,
        tasks: Sequence[Callable[[], None]],
        look: Callable[[], None] = lambda: None,
        every: float | None = None,
    ) -> None:
        """Runs tasks at the same time, and calls `look` every `every` seconds until they are done.

        An exception of `look`, and an interruption, ends all commands that are running.
        """
        with ThreadPoolExecutor(max(1, min(len(tasks), CONNECTIONS))) as pool:
            running = [pool.submit(task) for task in tasks]
            try:
                while wait(running, every).not_done:
                    look()
            except BaseException:
                self._end_all(running)
                raise
            for one in running:
                one.result()

    def _end_all(self, tasks: Sequence[Future[None]]) -> None:
        """Ends the commands of tasks, and those that the tasks would still have begun."""
        for task in tasks:
            task.cancel()
        while True:
            for process in list(self._running):
                _end(process)
            if not wait(tasks, 0.1).not_done:
                return

    def say(self, text: str) -> None:
        """Prints a line of text, except in a dry run, which prints only commands."""
        self._said = time.monotonic()
        if not self.dry_run:
            show(text, sys.stderr)

    @contextlib.contextmanager
    def never_silent(self, name: str, seconds: float = SILENCE_SECONDS) -> Iterator[None]:
        """Says what `name` waits for whenever nothing was said for `seconds`."""
        ended = threading.Event()

        def watch() -> None:
            while not ended.wait(min(1.0, seconds / 5)):
                if time.monotonic() - self._said > seconds:
                    oldest = next(iter(list(self._running.values())), "")
                    waits_for = oldest or "the next look at its state"
                    self.say(f"{name}: nothing new; waiting for {waits_for}")

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def _call(
        self, command: Command, seconds: float | None, *, capture: bool, stdin: str = ""
    ) -> tuple[int, str, str]:
        """Returns (exit code, output, errors) of a command.

        A command with a time limit has a session of its own, so that the limit also ends the
        processes that it has started, such as ssh.
        """
        words = shlex.join(command[:5])
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE if stdin else subprocess.DEVNULL,
                stdout=subprocess.PIPE if capture else None,
                stderr=subprocess.PIPE,
                encoding="utf-8",
                errors="replace",
                start_new_session=seconds is not None,
            )
        except FileNotFoundError:
            name = command[0]
            raise UserError(f"{name} is not installed; see {_INSTALL[name]}") from None
        self._running[process] = words
        try:
            output, errors = process.communicate(stdin or None, timeout=seconds)
        except subprocess.TimeoutExpired:
            _end(process)
            output, _ = process.communicate()
            raise Failed(f"{words} took longer than {seconds:g} s", output or "") from None
        except BaseException:  # Such as Ctrl-C.
            _end(process)
            raise
        finally:
            del self._running[process]
        return process.returncode, output or "", errors


def _end(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()


def _variable(name: str) -> str:
    """Returns a mark for a variable of the shell, which no argument of a program can contain."""
    return f"\0{name}\0"


def as_text(command: Command | Each) -> str:
    """Returns the line that runs a command where it is pasted into a shell."""
    if isinstance(command, Each):
        return command.text()
    return " ".join(map(_as_word, command))


def _as_word(word: str) -> str:
    texts = re.split(r"\0(\w+)\0", word)
    for number, text in enumerate(texts):
        texts[number] = f'"${text}"' if number % 2 else text and shlex.quote(text)
    return "".join(texts) or "''"


def _with_text(command: Command, stdin: str) -> str:
    text = as_text(command)
    return f"{text} <<'END'\n{stdin.rstrip()}\nEND" if stdin else text


def last_line(text: str) -> str:
    """Returns the lines of gcloud, `host.sh` or git that name an error, or the last line.

    The output of gcloud also contains lines, framed by `#`, about the host of a failed command.
    """
    lines = [line.strip() for line in text.splitlines() if line.strip(" #")]
    lines = [line for line in lines if not line.startswith("#")]
    told = [line for line in lines if line.lower().startswith(("error", "fatal"))]
    return " ".join(told or lines[-1:]) or "without a word"
