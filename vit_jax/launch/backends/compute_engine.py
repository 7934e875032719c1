"""Compute Engine: an instance template, a workload policy, and a managed instance group a slice.

The commands are those of docs.cloud.google.com/compute/docs/tpus/create-tpu-mig-multi-host-slice,
their flags those of docs.cloud.google.com/sdk/gcloud/reference/compute (`instance-templates`,
`resource-policies`, `instance-groups managed`, `ssh`, `scp`).
"""

import dataclasses
import re
import shlex
from collections.abc import Sequence

from vit_jax.errors import UserError, program
from vit_jax.launch.fleet import SSH_FLAGS, Fleet, Step
from vit_jax.launch.gcloud import gcloud
from vit_jax.launch.hosts_launcher import HostsLauncher
from vit_jax.launch.launcher import NO_CAPACITY, Unusable
from vit_jax.launch.shell import Command, Each, Shell
from vit_jax.launch.slices import ABSENT, COMING, LOST, READY, STOPPED, Slices, State
from vit_jax.parallel.accelerators import TPUS

IMAGE_PROJECT = "ubuntu-os-accelerator-images"  # docs.cloud.google.com/tpu/docs/tpu-os-images

MEGASCALE_PORT = 8080
"""The port of libtpu's coordinator of several slices, as on Cloud TPU."""

_EXISTS = ("already exists",)
_GONE = ("was not found",)

# States of instances: docs.cloud.google.com/compute/docs/instances/instance-lifecycle.
_KINDS = {
    COMING: ("PENDING", "PROVISIONING", "STAGING", "REPAIRING", "DEPROVISIONING"),
    LOST: ("PENDING_STOP", "STOPPING", "STOPPED", "TERMINATED"),
    STOPPED: ("SUSPENDING", "SUSPENDED"),
}

# The first error of the last attempt to create a host, which the group makes after it was created:
# docs.cloud.google.com/compute/docs/reference/rest/v1/instanceGroupManagers/listManagedInstances.
_ERROR = "lastAttempt.errors.errors[0].code,lastAttempt.errors.errors[0].message"
_NEVER = re.compile(r"not[ _]found|does not exist|invalid|permission|forbidden", re.IGNORECASE)

_METADATA = "http://metadata.google.internal/computeMetadata/v1/instance/attributes"


def _attribute(name: str) -> str:
    return f"curl -sf -H 'Metadata-Flavor: Google' {_METADATA}/{name}"


@dataclasses.dataclass(frozen=True)
class ComputeEngine(Fleet):
    """Slices that are managed instance groups.

    Raises:
      UserError: managed instance groups do not take the type, or a flag is for Cloud TPU alone.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        slices = self.slices
        slices.refuse("queued")
        if slices.autocheckpoint:
            raise UserError(
                "--autocheckpoint is for Cloud TPU; hosts of Compute Engine get SIGTERM in any case"
            )
        shape = slices.shape
        if slices.type and (shape is None or not shape.tpu.image):
            *others, last = [name for name, tpu in TPUS.items() if tpu.image]
            served = f"{', '.join(others)} and {last}"
            raise UserError(
                f"--type={slices.type}: managed instance groups take {served}; use"
                " --backend=cloud-tpu or --backend=gke"
            )
        if self._model() == "flex-start" and slices.type and not slices.max_run_duration:
            raise UserError("--provisioning-model=flex-start needs --max-run-duration, such as 7d")

    def _model(self) -> str:
        return "spot" if self.slices.is_spot else self.slices.provisioning_model

    def create(self) -> list[Step]:
        shape, name = self.slices.known_shape(), self.slices.name
        steps = [Step(self._template(), _EXISTS)]
        group = [f"--size={shape.hosts}"]
        if shape.hosts > 1 or self._model() == "flex-start":
            # All hosts of a slice come together, as soon as there is capacity for all, so that no
            # resize request is needed (docs.cloud.google.com/compute/docs/instance-groups/
            # about-bulk-mode). That page has named reservation-bound and flex-start as all that
            # bulk mode takes; the quickstart for TPUs (docs.cloud.google.com/compute/docs/tpus/
            # quickstart-create-tpu-multi-host-slice) takes it on demand. No host is replaced alone:
            # that would break the slice, and flex-start allows no repairs (about-bulk-mode).
            group += ["--target-size-policy-mode=bulk", "--default-action-on-vm-failure=do-nothing"]
        if shape.hosts > 1:
            policy = self._compute(
                "resource-policies", "create", "workload-policy", name, "--type=HIGH_THROUGHPUT",
                f"--accelerator-topology={shape.shape}", zone=False,
            )  # fmt: skip
            steps.insert(0, Step([*policy, f"--region={self.slices.region}"], _EXISTS))
            group.append(f"--workload-policy={self._path('resourcePolicies')}")
        for node in self.slices.nodes:
            words = ("create", node, f"--template={self._path('instanceTemplates')}", *group)
            steps.append(Step(self._groups(*words), _EXISTS))
        return steps

    def _template(self) -> Command:
        slices, shape = self.slices, self.slices.known_shape()
        flags = [
            f"--instance-template-region={slices.region}",
            f"--machine-type={shape.tpu.machine(shape.chips)}",
            f"--image-family={slices.version or shape.tpu.image}",
            f"--image-project={IMAGE_PROJECT}",
            "--maintenance-policy=TERMINATE",
            "--scopes=cloud-platform",
            "--boot-disk-size=200GB",
            *self._capacity(),
        ]
        flags += [f"--boot-disk-type={shape.tpu.disk}"] if shape.tpu.disk else []
        flags += ["--no-address"] if slices.internal_ip or slices.iap else []
        for flag, value in (
            ("network", slices.network),
            ("subnet", slices.subnetwork),
            ("region", slices.subnetwork and slices.region),
            ("service-account", slices.service_account),
            ("labels", slices.labels),
            ("tags", slices.tags),
        ):
            flags += [f"--{flag}={value}"] if value else []
        flags += [f"--disk={_disk(disk)}" for disk in slices.data_disk]
        words = ("instance-templates", "create", slices.name, *flags, *slices.flags)
        return self._compute(*words, zone=False)

    def _capacity(self) -> list[str]:
        """Returns the flags of on-demand, Spot, flex-start or reserved capacity."""
        slices, model = self.slices, self._model()
        flags = []
        if model:
            flags.append(f"--provisioning-model={model.upper().replace('-', '_')}")
        if slices.max_run_duration:
            flags.append(f"--max-run-duration={slices.max_run_duration}")
        if slices.max_run_duration or model in ("flex-start", "reservation-bound"):
            flags.append("--instance-termination-action=DELETE")
        elif model == "spot":
            flags.append("--instance-termination-action=STOP")
        if slices.reservation:
            flags += ["--reservation-affinity=specific", f"--reservation={slices.reservation}"]
        elif model == "flex-start":  # Else the hosts would take a reservation that fits.
            flags.append("--reservation-affinity=none")
        return flags

    def delete(self) -> list[Step]:
        name = self.slices.name
        steps = [Step(self._groups("delete", node), _GONE) for node in self.slices.nodes]
        region = f"--region={self.slices.region}"
        template = self._compute("instance-templates", "delete", name, zone=False)
        steps.append(Step([*template, region], _GONE))
        if self.slices.hosts != 1:
            policy = self._compute("resource-policies", "delete", name, zone=False)
            steps.append(Step([*policy, region], _GONE))
        return steps

    def look(self, shell: Shell) -> State:
        found = [self._look_at(shell, number) for number in range(self.slices.slices)]
        order = (ABSENT, LOST, STOPPED, COMING, READY)
        return min(found, key=lambda state: order.index(state.kind))

    def _look_at(self, shell: Shell, number: int) -> State:
        try:
            listing = self._list(number, f"value(name,currentAction,instanceStatus,{_ERROR})")
            pretend = "host\tNONE\tRUNNING\t\t\n" * max(1, self.slices.hosts)
            told = shell.ask(listing, pretend).splitlines()
        except UserError as error:
            if any(text in str(error) for text in (*_GONE, "NOT_FOUND")):
                return State(ABSENT, ABSENT)
            raise
        # A line without a tab continues the message of an error.
        return self._state([(line + 4 * "\t").split("\t")[1:5] for line in told if "\t" in line])

    def _state(self, hosts: Sequence[Sequence[str]]) -> State:
        """Returns the state of a group of hosts, each [action, status, error's code, message]."""
        # Somebody deletes the group, unless hosts end so: it was not preempted, and will be absent.
        if not self._ends() and any(action == "DELETING" for action, *_ in hosts):
            return State(COMING, "DELETING")
        # A host that is being created, or deleted, has no status yet, or any more.
        states = [state.strip() for _, state, *_ in hosts]
        for kind in (LOST, STOPPED):
            bad = [state for state in states if state in self._names(kind)]
            if bad:
                return State(kind, bad[0])
        running = states.count("RUNNING")
        if running >= max(1, self.slices.hosts):
            return State(READY, "RUNNING")
        errors = [": ".join(filter(None, error)) for _, _, *error in hosts if any(error)]
        if errors:
            return State(COMING, _pending(self.slices.name, errors[0]))
        coming = [state for state in states if state in self._names(COMING)]
        # Hosts come all together, so that some of them are a slice that has lost others.
        if not coming and running and len(states) < self.slices.hosts:
            return State(LOST, f"{running} of {self.slices.hosts} hosts RUNNING")
        return State(COMING, (coming or ["PENDING"])[0])

    def _ends(self) -> bool:
        """Returns whether the cloud deletes hosts when their time ends."""
        return "--instance-termination-action=DELETE" in self._capacity()

    def _names(self, kind: str) -> Sequence[str]:
        """Returns the states of hosts that are of this kind.

        Only Spot hosts, and those whose time ends, are stopped by the cloud; others by somebody.
        """
        if self.slices.is_spot or self._ends():
            return _KINDS[kind]
        return {
            COMING: (*_KINDS[COMING], "PENDING_STOP", "STOPPING"),
            LOST: (),
            STOPPED: (*_KINDS[STOPPED], "STOPPED", "TERMINATED"),
        }[kind]

    def on_hosts(self, number: int, script: str) -> list[Command | Each]:
        return [self._ssh(number, script)]

    def on_host(self, number: int, worker: str, script: str) -> Each:
        # The names of instances do not tell their numbers in the slice; they themselves do.
        own = f'[ "$({_attribute("agent-worker-number")})" != {shlex.quote(worker)} ] || {script}'
        return self._ssh(number, own)

    def _ssh(self, number: int, script: str) -> Each:
        def ssh(host: str) -> Command:
            return self._compute("ssh", host, *self._way(), *SSH_FLAGS, f"--command={script}")

        return Each(self._list(number, "value(name)"), ssh)

    def copy(self, number: int, files: Sequence[str]) -> list[Command | Each]:
        flags = [flag.replace("--ssh-flag", "--scp-flag") for flag in SSH_FLAGS]

        def scp(host: str) -> Command:
            return self._compute("scp", *files, f"{host}:", *self._way(), *flags)

        return [Each(self._list(number, "value(name)"), scp)]

    def environments(self, shell: Shell) -> list[dict[str, str]]:
        """Returns what JAX and libtpu look for when there are several slices.

        Cloud TPU puts these into the metadata of its nodes; JAX reads the environment first
        (jax/_src/clusters/cloud_tpu_cluster.py).
        """
        if self.slices.slices == 1:
            return super().environments(shell)
        # The endpoints are in the order of the processes, of which the first coordinates.
        first = f"{_attribute('worker-network-endpoints')} | cut -d, -f1 | sed 's/.*://'; echo"
        host = shell.ask_first("FIRST_HOST", self._ssh(0, first))
        if not host:
            raise UserError(f"no host of {self.slices.nodes[0]} tells the hosts of its slice")
        return [
            {
                "MEGASCALE_COORDINATOR_ADDRESS": f"{host}:{MEGASCALE_PORT}",
                "MEGASCALE_PORT": str(MEGASCALE_PORT),
                "MEGASCALE_NUM_SLICES": str(self.slices.slices),
                "MEGASCALE_SLICE_ID": str(number),
            }
            for number in range(self.slices.slices)
        ]

    def _way(self) -> list[str]:
        if self.slices.iap:
            return ["--tunnel-through-iap"]
        return ["--internal-ip"] if self.slices.internal_ip else []

    def _list(self, number: int, fields: str) -> Command:
        return self._groups("list-instances", self.slices.nodes[number], f"--format={fields}")

    def _path(self, collection: str) -> str:
        """Returns the name of a regional resource of ours; the commands refuse a bare name."""
        project = self.slices.project
        if not project:
            raise UserError("--backend=compute-engine needs --project")
        return f"projects/{project}/regions/{self.slices.region}/{collection}/{self.slices.name}"

    def _groups(self, action: str, *arguments: str) -> Command:
        return self._compute("instance-groups", "managed", action, *arguments)

    def _compute(self, *arguments: str, zone: bool = True) -> Command:
        where = [f"--zone={self.slices.zone}"] if zone else []
        where += [f"--project={self.slices.project}"] if self.slices.project else []
        return gcloud("compute", *arguments, *where, "--quiet")


def _pending(name: str, error: str) -> str:
    """Returns the state of groups that have failed to create a host, and will try again.

    Raises:
      UserError: it would fail again. `Unusable`, if nothing but other flags helps.
    """
    told = (
        f"the hosts of {name} cannot be created: {error.rstrip('.')}; {program()} tpu delete {name}"
        " deletes its group"
    )
    if not NO_CAPACITY.search(error):
        if _NEVER.search(error):
            raise Unusable(told)
        if "quota" in error.lower():
            raise UserError(told)
    return f"PENDING ({error})"


def _disk(text: str) -> str:
    """Returns `source=PATH,mode=read-only`, as Cloud TPU takes it, as Compute Engine does."""
    parts = dict(part.partition("=")[::2] for part in text.split(","))
    if "source" not in parts:
        raise UserError(f"--data-disk={text}: write source=DISK[,mode=read-only]")
    mode = "ro" if parts.get("mode", "").startswith("read-only") else "rw"
    return f"name={parts['source'].rpartition('/')[2]},mode={mode}"


def launcher(slices: Slices, shell: Shell, poll: float) -> HostsLauncher:
    """Returns the launcher of managed instance groups."""
    return HostsLauncher(slices, shell, poll, ComputeEngine(slices))
