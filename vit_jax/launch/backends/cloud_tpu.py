"""The Cloud TPU API (`gcloud compute tpus`), which serves v2 to v6e.

Flags are those of the public reference: docs.cloud.google.com/sdk/gcloud/reference/compute/tpus,
below it `tpu-vm` and `queued-resources`, and the same pages under gcloud/reference/alpha
(`vit_jax.launch.gcloud`).
"""

import dataclasses
from collections.abc import Sequence

from vit_jax.errors import UserError
from vit_jax.launch.fleet import SSH_FLAGS, Fleet, Step, ranges
from vit_jax.launch.gcloud import gcloud
from vit_jax.launch.hosts_launcher import HostsLauncher
from vit_jax.launch.shell import Command, Each, Shell
from vit_jax.launch.slices import ABSENT, COMING, LOST, READY, STOPPED, Slices, State

# States of nodes and of queued resources: docs.cloud.google.com/tpu/docs/reference/rest/v2,
# projects.locations.nodes and projects.locations.queuedResources.
_KINDS = {
    READY: ("READY", "ACTIVE"),
    COMING: (
        "CREATING", "STARTING", "RESTARTING", "REPAIRING", "REIMAGING", "ACCEPTED", "PROVISIONING",
        "WAITING_FOR_RESOURCES", "SUSPENDING", "DELETING", "STOPPING", "HIDING", "UNHIDING",
        "STATE_UNSPECIFIED",
    ),
    LOST: ("PREEMPTED", "TERMINATED", "SUSPENDED", "FAILED", "UNKNOWN"),
    STOPPED: ("STOPPED", "HIDDEN"),
    ABSENT: (ABSENT,),
}  # fmt: skip
_SEVERITY = (READY, COMING, ABSENT, STOPPED, LOST)
_ILL = ("TIMEOUT", "UNHEALTHY_TENSORFLOW", "UNHEALTHY_MAINTENANCE", "DEPRECATED_UNHEALTHY")
_GONE = ("NOT_FOUND", "was not found")


@dataclasses.dataclass(frozen=True)
class CloudTpu(Fleet):
    """Slices that are nodes of the Cloud TPU API."""

    def __post_init__(self) -> None:
        super().__post_init__()
        slices = self.slices
        if slices.max_run_duration and not slices.is_queued:
            raise UserError("--max-run-duration is only for queued resources; add --queued")

    def create(self) -> list[Step]:
        slices = self.slices
        if not slices.is_queued:
            runtime = f"--version={self._runtime()}"
            return [Step(self._tpus("tpu-vm", "create", slices.name, *self._flags(), runtime))]
        nodes = [f"--node-id={slices.name}"]
        if slices.slices > 1:
            nodes = [f"--node-count={slices.slices}", f"--node-prefix={slices.name}"]
        runtime = f"--runtime-version={self._runtime()}"
        words = ("queued-resources", "create", slices.name, *nodes, *self._flags(), runtime)
        return [Step(self._tpus(*words))]

    def _flags(self) -> list[str]:
        slices = self.slices
        flags = self._type()
        flags += ["--spot"] if slices.spot else []
        flags += ["--internal-ips"] if slices.internal_ip else []
        flags += ["--autocheckpoint-enabled"] if slices.autocheckpoint else []
        for field in (
            "network", "subnetwork", "service_account", "reservation", "provisioning_model",
            "max_run_duration", "labels", "tags",
        ):  # fmt: skip
            value = getattr(slices, field)
            flags += [f"--{field.replace('_', '-')}={value}"] if value else []
        flags += [f"--data-disk={disk}" for disk in slices.data_disk]
        return [*flags, *slices.flags]

    def _type(self) -> list[str]:
        """Returns the flags for the type in Cloud TPU's spelling, `v5litepod-8` for `v5e-8`.

        Shapes that no type has are of v4 and later (docs.cloud.google.com/tpu/docs/v4).
        """
        shape = self.slices.shape
        if shape is None:
            return [f"--accelerator-type={self.slices.type}"]
        if shape.tpu.shapes.get(shape.chips) == shape.shape:
            return [f"--accelerator-type={shape.type}"]
        return [f"--type={shape.tpu.type}", f"--topology={shape.shape}"]

    def _runtime(self) -> str:
        if self.slices.version:
            return self.slices.version
        shape = self.slices.shape
        if shape is None:
            raise UserError(
                f"--type={self.slices.type}: its TPU runtime is not known; add --version=NAME"
            )
        if not shape.tpu.runtime:
            raise UserError(
                f"--type={self.slices.type}: the Cloud TPU API does not serve {shape.generation};"
                " use --backend=compute-engine or --backend=gke"
            )
        return shape.tpu.runtime

    def delete(self) -> list[Step]:
        if self.slices.is_queued:
            words = ("queued-resources", "delete", self.slices.name, "--force")
            return [Step(self._tpus(*words), _GONE)]
        return [Step(self._tpus("tpu-vm", "delete", self.slices.name), _GONE)]

    def look(self, shell: Shell) -> State:
        slices = self.slices
        if not slices.is_queued:
            return _state(shell, self._describe(slices.name))
        words = ("queued-resources", "describe", slices.name, "--format=value(state.state)")
        found = _state(shell, self._tpus(*words))
        if found.kind != READY or shell.dry_run:
            return found
        # A queued resource has no health, and keeps its state while a node of it is repaired.
        nodes = [_state(shell, self._describe(node)) for node in slices.nodes]
        worst = max(nodes, key=lambda node: (_SEVERITY.index(node.kind), bool(node.illness)))
        if worst.kind == ABSENT:  # The resource itself will say that it is SUSPENDED, or gone.
            return State(COMING, f"{found.told} without a node")
        return found if worst.kind == READY and not worst.illness else worst

    def _describe(self, node: str) -> Command:
        return self._tpus("tpu-vm", "describe", node, "--format=value(state,health)")

    def start_again(self) -> str:
        return " ".join(self._tpus("tpu-vm", "start", self.slices.name))

    def on_hosts(self, number: int, script: str) -> list[Command | Each]:
        return [self.on_host(number, worker, script) for worker in ranges(self.slices.hosts)]

    def on_host(self, number: int, worker: str, script: str) -> Command:
        node = self.slices.nodes[number]
        words = ("ssh", node, *self._way(), *SSH_FLAGS, f"--worker={worker}", f"--command={script}")
        return self._tpus("tpu-vm", *words)

    def copy(self, number: int, files: Sequence[str]) -> list[Command | Each]:
        node = self.slices.nodes[number]
        return [
            self._tpus(
                "tpu-vm", "scp", *files, f"{node}:", *self._way(),
                *(flag.replace("--ssh-flag", "--scp-flag") for flag in SSH_FLAGS),
                f"--worker={worker}",
            )
            for worker in ranges(self.slices.hosts)
        ]  # fmt: skip

    def _way(self) -> list[str]:
        # Only the alpha commands tunnel (gcloud/reference/alpha/compute/tpus/tpu-vm/ssh).
        if self.slices.iap:
            return ["--tunnel-through-iap"]
        return ["--internal-ip"] if self.slices.internal_ip else []

    def _tpus(self, kind: str, action: str, *arguments: str) -> Command:
        # Questions would not be visible, because the output is captured for error messages.
        where = [f"--zone={self.slices.zone}", "--quiet"]
        where += [f"--project={self.slices.project}"] if self.slices.project else []
        return gcloud("compute", "tpus", kind, action, *arguments, *where)


def _state(shell: Shell, command: Command) -> State:
    try:
        told = shell.ask(command, pretend="READY\tHEALTHY").split() or [ABSENT]
    except UserError as error:
        if any(text in str(error) for text in _GONE):
            return State(ABSENT, ABSENT)
        raise
    state, health = told[0], told[-1]
    kind = next((kind for kind, names in _KINDS.items() if state in names), COMING)
    return State(kind, state, health if kind == READY and health in _ILL else "")


def launcher(slices: Slices, shell: Shell, poll: float) -> HostsLauncher:
    """Returns the launcher of Cloud TPU slices."""
    return HostsLauncher(slices, shell, poll, CloudTpu(slices))
