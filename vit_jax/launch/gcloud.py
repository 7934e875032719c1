"""Builds and runs the `gcloud` commands that create, reach and delete Cloud TPU slices."""

import dataclasses
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from vit_jax.errors import UserError
from vit_jax.parallel import accelerators

Command = list[str]

READY = ("READY", "ACTIVE")
COMING = (
    "CREATING", "STARTING", "RESTARTING", "REPAIRING", "REIMAGING", "ACCEPTED",
    "PROVISIONING", "WAITING_FOR_RESOURCES", "SUSPENDING",
)  # fmt: skip
"""Transient states, which Cloud TPU changes without a command."""
LOST = ("PREEMPTED", "TERMINATED", "SUSPENDED", "FAILED")
"""States of slices that Cloud TPU has taken away, which must be created again."""
ABSENT = "ABSENT"


def check_name(name: str) -> str:
    """Returns the name of a slice, which files here and on the hosts have too.

    Raises:
      UserError: the name is not valid for Cloud TPU.
    """
    if not re.fullmatch(r"[a-z](?:[a-z0-9-]{0,61}[a-z0-9])?", name):
        raise UserError(
            f"{name!r} is no name of a slice; write at most 63 lower-case letters, digits and"
            " hyphens, with a letter first and no hyphen last"
        )
    return name


@dataclasses.dataclass(frozen=True)
class Slices:
    """The TPU slices that were, or will be, created under one name.

    Attributes:
      type: the accelerator type, such as v5litepod-256.
      version: the TPU runtime; empty for the default runtime of the type.
      slices: the number of slices of that type, connected by the data center's network.
      queued: requests a queued resource, which waits for capacity; several slices always do so.

    Raises:
      UserError: the name is not valid for Cloud TPU.
    """

    name: str
    zone: str
    type: str = ""
    project: str = ""
    version: str = ""
    spot: bool = False
    queued: bool = False
    slices: int = 1
    internal_ip: bool = False
    network: str = ""
    subnetwork: str = ""
    service_account: str = ""

    def __post_init__(self) -> None:
        check_name(self.name)

    @property
    def is_queued(self) -> bool:
        return self.queued or self.slices > 1

    @property
    def nodes(self) -> list[str]:
        """Returns the names of the TPU VMs, one for each slice."""
        if self.slices == 1:
            return [self.name]
        return [f"{self.name}-{number}" for number in range(self.slices)]

    def create(self) -> Command:
        """Returns the command that creates the slices.

        Raises:
          UserError: the runtime of the type is not known.
        """
        flags = [f"--accelerator-type={self._accelerator_type()}"]
        flags += ["--spot"] if self.spot else []
        flags += ["--internal-ips"] if self.internal_ip else []
        for flag in ("network", "subnetwork", "service_account"):
            value = getattr(self, flag)
            flags += [f"--{flag.replace('_', '-')}={value}"] if value else []
        version = self.version or self._usual_version()
        if not self.is_queued:
            return self._tpus("tpu-vm", "create", self.name, *flags, f"--version={version}")
        nodes = [f"--node-id={self.name}"]
        if self.slices > 1:
            nodes = [f"--node-count={self.slices}", f"--node-prefix={self.name}"]
        return self._tpus(
            "queued-resources", "create", self.name, *nodes, *flags, f"--runtime-version={version}"
        )

    def delete(self) -> Command:
        if self.is_queued:
            return self._tpus("queued-resources", "delete", self.name, "--force")
        return self._tpus("tpu-vm", "delete", self.name)

    def describe(self) -> Command:
        if self.is_queued:
            where = "--format=value(state.state)"
            return self._tpus("queued-resources", "describe", self.name, where)
        return self._tpus("tpu-vm", "describe", self.name, "--format=value(state)")

    def ssh(self, node: str, command: str, worker: str = "all") -> Command:
        return self._tpus(
            "tpu-vm", "ssh", node, *self._inside(), f"--worker={worker}", f"--command={command}"
        )

    def scp(self, files: Sequence[str], node: str) -> Command:
        return self._tpus("tpu-vm", "scp", *files, f"{node}:", *self._inside(), "--worker=all")

    def _inside(self) -> list[str]:
        return ["--internal-ip"] if self.internal_ip else []

    def _usual_version(self) -> str:
        generation = accelerators.tpu_generation(self.type.partition("-")[0])
        tpu = accelerators.TPUS.get(generation or "")
        if tpu is None:
            raise UserError(f"--type={self.type}: its TPU runtime is not known; add --version=NAME")
        if not tpu.runtime:
            raise UserError(
                f"--type={self.type}: the Cloud TPU API does not serve {generation}; use GKE or"
                " Compute Engine, see docs/launching.md"
            )
        return tpu.runtime

    def _accelerator_type(self) -> str:
        """Returns the type in Cloud TPU's spelling, such as `v5litepod-8` for `v5e-8`."""
        name, dash, size = self.type.partition("-")
        tpu = accelerators.TPUS.get(accelerators.tpu_generation(name) or "")
        return f"{tpu.type}{dash}{size}" if tpu else self.type

    def _tpus(self, *arguments: str) -> Command:
        # Questions would not be visible, because `Gcloud` captures the output for error messages.
        where = [f"--zone={self.zone}", "--quiet"]
        where += [f"--project={self.project}"] if self.project else []
        return ["gcloud", "compute", "tpus", *arguments, *where]


class Gcloud:
    """Runs commands, or only prints them (`dry_run`).

    Raises:
      UserError: `gcloud` is not installed, or a command failed; the message has its last line.
    """

    def __init__(self, *, dry_run: bool = False):
        self.dry_run = dry_run

    def run(self, command: Command) -> None:
        """Runs `command` and shows its output."""
        if self.dry_run:
            print(shlex.join(command))
            return
        done = self._call(command, stdout=None)
        if done.returncode:
            raise UserError(f"{shlex.join(command[:5])} failed: {_last_line(done.stderr)}")

    def ask(self, command: Command, pretend: str = "") -> str:
        """Returns the output of `command`, or `pretend` in a dry run."""
        if self.dry_run:
            print(shlex.join(command))
            return pretend
        done = self._call(command, stdout=subprocess.PIPE)
        if done.returncode:
            raise UserError(f"{shlex.join(command[:5])} failed: {_last_line(done.stderr)}")
        return done.stdout

    def state(self, slices: Slices) -> str:
        """Returns the state of slices, such as READY or PREEMPTED; `ABSENT` if there are none."""
        try:
            return self.ask(slices.describe(), pretend="READY").strip() or ABSENT
        except UserError as error:
            if "NOT_FOUND" in str(error) or "was not found" in str(error):
                return ABSENT
            raise

    def everywhere(self, slices: Slices, script: str, pretend: str = "") -> str:
        """Runs a shell script on all hosts of all slices at the same time; returns its output."""
        commands = [slices.ssh(node, script) for node in slices.nodes]
        if self.dry_run:
            return "".join(self.ask(command, pretend) for command in commands)
        with ThreadPoolExecutor(len(commands)) as pool:
            return "".join(pool.map(self.ask, commands))

    def copy(self, slices: Slices, files: Sequence[str]) -> None:
        """Copies local files to the home folders of all hosts."""
        for node in slices.nodes:
            self.run(slices.scp(files, node))

    def say(self, text: str) -> None:
        """Prints a line of text, except in a dry run, which prints only commands."""
        if not self.dry_run:
            print(text, file=sys.stderr, flush=True)

    def _call(self, command: Command, stdout: int | None) -> subprocess.CompletedProcess:
        try:
            return subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=subprocess.PIPE,
                encoding="utf-8",
                errors="replace",
                check=False,
            )
        except FileNotFoundError:
            raise UserError(
                "gcloud is not installed; see https://cloud.google.com/sdk/docs/install"
            ) from None


def _last_line(text: str) -> str:
    """Returns the lines of gcloud, `host.sh` or git that name an error, or the last line.

    The output of gcloud also contains lines, framed by `#`, about the host of a failed command.
    """
    lines = [line.strip() for line in text.splitlines() if line.strip(" #")]
    lines = [line for line in lines if not line.startswith("#")]
    told = [line for line in lines if line.lower().startswith(("error", "fatal"))]
    return " ".join(told or lines[-1:]) or "without a word"


def remember(slices: Slices) -> None:
    """Stores the description of created slices, so that later commands need only the name."""
    path = _memory(slices.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dataclasses.asdict(slices), indent=1) + "\n")


def recall(name: str) -> Slices | None:
    """Returns the slices that `remember` stored on this machine, or None."""
    path = _memory(name)
    return Slices(**json.loads(path.read_text())) if path.exists() else None


def forget(name: str) -> None:
    _memory(name).unlink(missing_ok=True)


def _memory(name: str) -> Path:
    home = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(home) / "vit_jax" / "tpu" / f"{check_name(name)}.json"
