"""A lock on a workdir, so that two trainings never write into the same one."""

import contextlib
import dataclasses
import fcntl
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from etils import epath

from vit_jax import storage
from vit_jax.errors import UserError

FILE = "LOCK"

BEAT_SECONDS = 15.0
"""The holder of a lock rewrites it this often."""

STALE_SECONDS = 60.0
"""A lock of another host that does not change for this long was left by a run that is gone."""

_SETTLE_SECONDS = 2.0
_WATCH_SECONDS = 0.5

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Holder:
    """The process that holds a lock, as the lock's file stores it.

    Attributes:
      key: a random name of this one acquisition.
      started: when the lock was taken, as a person reads it.
      scope: the boot of the host and the container, within which `pid` names one process.
      birth: the start of the process in ticks of its host, since numbers of processes are reused.
      beat: a count of the times that the holder has rewritten the file.
    """

    key: str = ""
    host: str = "an unknown host"
    pid: int = 0
    started: str = "an unknown time"
    scope: str = ""
    birth: str = ""
    beat: int = 0

    @classmethod
    def current(cls) -> "Holder":
        """Returns this process as the holder of a new lock."""
        started = time.strftime("%Y-%m-%d %H:%M:%S %Z")
        pid = os.getpid()
        return cls(uuid.uuid4().hex, socket.gethostname(), pid, started, _scope(), _birth(pid))

    @classmethod
    def parse(cls, content: str | bytes) -> "Holder":
        """Returns the holder that a file names; fields that are missing or wrong are unknown."""
        try:
            stored: dict[str, Any] = storage.parse_json(content)
            unknown = dataclasses.asdict(cls())
            return cls(**{name: type(value)(stored[name]) for name, value in unknown.items()})
        except (ValueError, KeyError, TypeError):
            return cls()

    def is_gone(self) -> bool | None:
        """Returns whether this process has ended, or None if it cannot be seen from here."""
        if not self.scope or self.scope != _scope():
            return None
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:  # A process of another user.
            pass
        return self.birth != _birth(self.pid)

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, which began at {self.started}"


class WorkdirLock:
    """Holds the lock of a workdir within its `with` block.

    The lock is the file `LOCK`, created only if it is absent. It names its holder, who rewrites it
    every `BEAT_SECONDS`. A lock whose holder is gone is taken over: at once if that was a process
    of this host, and otherwise if the file does not change for `STALE_SECONDS`. No clocks of two
    hosts are compared. Object stores create the file by a conditional write (see `storage.create`).
    Where a store has none, and on network file systems while a lock is taken over, two processes
    may both create the file: the one whose file was overwritten finds out when it looks again, here
    or in `check`.

    Args:
      is_holder: False in all processes of a run but the first, where nothing happens.
    """

    def __init__(self, workdir: epath.Path, *, is_holder: bool = True):
        self._workdir = workdir
        self._path = workdir / FILE
        self._is_holder = is_holder
        self._holder = Holder.current()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="vit-lock", daemon=True)

    def __enter__(self) -> "WorkdirLock":
        """Takes the lock. Raises a `UserError` that names the holder if another run has it."""
        if self._is_holder:
            try:
                self._take()
            except storage.errors() as error:
                raise UserError(f"{self._path}: cannot be written ({error})") from error
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._is_holder:
            self._closing.set()
            self._thread.join()
            with contextlib.suppress(*storage.errors()):
                if self._is_ours(self._read()):
                    self._path.unlink()

    def check(self) -> None:
        """Raises a `UserError` if the workdir is no longer this run's to write into."""
        if not self._is_holder:
            return
        try:
            found = self._read()
        except storage.errors() as error:
            raise UserError(f"{self._workdir} can no longer be read ({error})") from error
        if found is None:
            raise UserError(
                f"{self._workdir} was moved, deleted or unmounted while this run was training:"
                f" {self._path} is gone"
            )
        if not self._is_ours(found):
            raise UserError(f"{self._workdir} was taken over by {found}; this run ends")

    def _take(self) -> None:
        with _one_at_a_time(self._workdir):
            while not self._create():
                found = self._read()
                if found is None:
                    continue
                if not self._was_left(found):
                    raise UserError(
                        f"workdir={self._workdir} is in use by {found}: wait until it ends, or"
                        " give another workdir (if this folder is a copy, delete LOCK in it)"
                    )
                if self._read() == found:
                    self._path.unlink(missing_ok=True)

    def _create(self) -> bool:
        """Returns whether the lock was free and is now this process's."""
        content = self._content(self._holder)
        if not storage.is_remote(self._path):
            try:
                with open(self._path, "xb") as file:
                    file.write(content)
                return True
            except FileExistsError:
                return False
        created = storage.create(self._path, content)
        if created is not None:
            return created
        if self._path.exists():
            return False
        advice = storage.how_to_create(self._path)
        logger.warning(
            "%s: no conditional write to this store is possible, so two runs that start at the same"
            " moment may both begin, until one of them finds the lock overwritten%s",
            self._path, f"; {advice}" if advice else "",
        )  # fmt: skip
        storage.write_atomically(self._path, content)
        time.sleep(_SETTLE_SECONDS)
        return self._is_ours(self._read())

    def _was_left(self, found: Holder) -> bool:
        """Returns whether the holder of the lock is gone, which may take time to find out."""
        is_gone = found.is_gone()
        if is_gone is not None:
            return is_gone
        logger.warning(
            "%s names %s: waiting %g s to see whether it is still training",
            self._path, found, STALE_SECONDS,
        )  # fmt: skip
        written = self._written()
        deadline = time.monotonic() + STALE_SECONDS
        while time.monotonic() < deadline:
            time.sleep(min(_WATCH_SECONDS, STALE_SECONDS / 4))
            if self._read() != found or self._written() != written:
                return False
        return True

    def _beat(self) -> None:
        """Rewrites the lock until it is released or no longer this process's."""
        while not self._closing.wait(BEAT_SECONDS):
            with contextlib.suppress(*storage.errors()):
                if not self._is_ours(self._read()):
                    return
                beat = self._holder.beat + 1
                self._holder = dataclasses.replace(self._holder, beat=beat)
                self._rewrite()

    def _rewrite(self) -> None:
        try:
            storage.write_atomically(self._path, self._content(self._holder))
        except storage.errors():
            if storage.is_remote(self._path):
                raise
            os.utime(self._path)  # A full disk has no room for a file, but for a new time.

    def _written(self) -> float:
        """Returns when a file system last wrote the lock, by its own clock; 0 on other storage."""
        with contextlib.suppress(OSError):
            return os.stat(self._path).st_mtime
        return 0.0

    def _read(self) -> Holder | None:
        """Returns who holds the lock, or None if nobody does."""
        try:
            return Holder.parse(storage.read_bytes(self._path))
        except storage.errors() as error:
            if isinstance(error, FileNotFoundError) or not self._path.exists():
                return None
            raise

    def _is_ours(self, found: Holder | None) -> bool:
        return found is not None and found.key == self._holder.key

    def _content(self, holder: Holder) -> bytes:
        return json.dumps(dataclasses.asdict(holder)).encode()


@contextlib.contextmanager
def _one_at_a_time(workdir: epath.Path) -> Iterator[None]:
    """Lets only one process of this host at a time look at the lock of a workdir and take it.

    Without this, two that find the same old lock could each remove what the other has created.
    """
    with contextlib.ExitStack() as stack:
        if not storage.is_remote(workdir):
            with contextlib.suppress(OSError):  # Not every network file system can do this.
                folder = os.open(workdir, os.O_RDONLY)
                stack.callback(os.close, folder)
                fcntl.flock(folder, fcntl.LOCK_EX)
        yield


def _scope() -> str:
    """Returns a name for the boot of this host and this container's own numbers of processes."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def _birth(pid: int) -> str:
    """Returns when a process of this host started, in ticks since the boot; "" if unknown."""
    try:
        # The second field is the name of the program, which may hold spaces and parentheses.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""
