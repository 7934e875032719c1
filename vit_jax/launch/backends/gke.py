"""GKE: a node pool for each slice, and a JobSet that Kubernetes keeps going.

The commands are those of docs.cloud.google.com/sdk/gcloud/reference/container/node-pools and
kubernetes.io/docs/reference/kubectl. The cluster needs the JobSet controller
(jobset.sigs.k8s.io/docs/installation).
"""

import dataclasses
import functools
import json
import time
from collections.abc import Sequence

from vit_jax.errors import UserError, program, quoted, show
from vit_jax.launch import jobset
from vit_jax.launch import slices as slices_lib
from vit_jax.launch.gcloud import gcloud
from vit_jax.launch.health import CHECK_SECONDS, table
from vit_jax.launch.launcher import Launcher, Unusable, on_one_line
from vit_jax.launch.shell import CREATE_SECONDS, Command, Failed, Shell
from vit_jax.launch.slices import Slices

# gcloud tells of node pools "ResponseError: code=404, message=Not found: projects/...", and of
# policies "The resource 'projects/...' was not found".
_GCLOUD_GONE = ("code=404", "NOT_FOUND", "was not found")
_KUBECTL_GONE = "(NotFound)"

_LONGEST = {"node pool": 40, "pod": 63}
"""The most characters of a name: of node pools, beyond which GKE refuses to create one, and of
pods, to whose names JobSet adds five characters, and beyond which it refuses a manifest
(kubernetes.io/docs/concepts/overview/working-with-objects/names, RFC 1123 label names)."""


@dataclasses.dataclass
class GkeLauncher(Launcher):
    """Creates node pools, and applies the manifest of a run.

    Raises:
      UserError: a flag is not for GKE, whose nodes have the network and the image of the cluster.
    """

    copies_code = False

    _project: str = dataclasses.field(default="", init=False)

    def __post_init__(self) -> None:
        self.slices.refuse(
            "queued", "version", "internal_ip", "iap", "network", "subnetwork", "data_disk",
            "autocheckpoint",
        )  # fmt: skip

    def create(self) -> None:
        """Creates a node pool for each slice, and lets kubectl know the cluster.

        Pools that are there already, as after an interruption, stay.
        """
        slices, shape = self.slices, self.slices.known_shape()
        self._check_names(shape.hosts)
        if not slices.cluster:
            raise UserError("tpu create: --cluster is missing: the GKE cluster of the node pools")
        if not self.shell.dry_run:
            # Without its project a later command could mean another cluster.
            wanted = dataclasses.replace(slices, project=self._known_project())
            known = slices_lib.recall(slices.name)
            field = slices_lib.differing(known, wanted) if known else ""
            if known and field:
                raise slices_lib.taken(known, field)
            slices_lib.remember(wanted)
        if self._has_policy():
            policy = [
                "compute", "resource-policies", "create", "workload-policy", slices.name,
                "--type=HIGH_THROUGHPUT", f"--accelerator-topology={shape.shape}",
                f"--region={slices.region}",
            ]  # fmt: skip
            self.shell.run(self._gcloud(*policy), CREATE_SECONDS, ("already exists",))
        for node in slices.nodes:
            self.request(functools.partial(self._make, node))
        self.shell.run(
            self._gcloud("container", "clusters", "get-credentials", slices.cluster, self._where())
        )

    def _check_names(self, hosts: int) -> None:
        """Raises a `UserError` if the name makes one that GKE or Kubernetes would refuse."""
        name = self.slices.name
        names = {
            "node pool": self.slices.nodes[-1],
            "pod": f"{name}-check-{jobset.JOB}-{self.slices.slices - 1}-{hosts - 1}-XXXXX",
        }
        for what, found in names.items():
            over = len(found) - _LONGEST[what]
            if over > 0:
                raise UserError(
                    f"{name} is too long for GKE, where {found} would be the name of a {what};"
                    f" write at most {len(name) - over} characters"
                )

    def _make(self, node: str) -> None:
        """Creates a node pool unless it is there; deletes one that could not be created before."""
        try:
            status = self.shell.ask(self._pool("describe", node, "--format=value(status)")).strip()
        except UserError as error:
            if not any(text in str(error) for text in _GCLOUD_GONE):
                raise
            status = ""
        if status == "ERROR":  # As after a request for which there was no capacity.
            self.shell.run(self._pool("delete", node), CREATE_SECONDS, _GCLOUD_GONE)
        if status in ("", "ERROR"):
            self.shell.run(self._pool("create", node, *self._flags()), CREATE_SECONDS)

    def _has_policy(self) -> bool:
        """Returns whether the topology of a slice is a policy of its own."""
        shape = self.slices.shape
        return shape is not None and shape.tpu.placement_policy and shape.hosts > 1

    def _flags(self) -> list[str]:
        slices, shape = self.slices, self.slices.known_shape()
        model = "spot" if slices.is_spot else slices.provisioning_model
        flags = [f"--machine-type={shape.tpu.machine(shape.chips)}"]
        flags += [f"--node-locations={slices.zone}"] if slices.zone else []
        flags += [f"--tpu-topology={shape.shape}"] if shape.hosts > 1 else []
        flags += [f"--placement-policy={slices.name}"] if self._has_policy() else []
        flags += [f"--disk-type={shape.tpu.disk}"] if shape.tpu.disk else []
        if model == "flex-start":  # Nodes come when the run asks for them, all together.
            flags += [
                "--flex-start", "--num-nodes=0", "--enable-autoscaling", "--min-nodes=0",
                f"--max-nodes={shape.hosts}", "--reservation-affinity=none",
            ]  # fmt: skip
        else:
            flags.append(f"--num-nodes={shape.hosts}")
            flags += ["--spot"] if model == "spot" else []
        if slices.reservation:
            flags += ["--reservation-affinity=specific", f"--reservation={slices.reservation}"]
        if slices.max_run_duration:
            flags.append(f"--max-run-duration={slices.max_run_duration}")
        flags += [f"--labels={slices.labels}"] if slices.labels else []
        flags += [f"--tags={slices.tags}"] if slices.tags else []
        return [*flags, "--scopes=cloud-platform", *slices.flags]

    def render(self, arguments: Sequence[str]) -> str:
        """Returns the manifest of a run as YAML."""
        return jobset.to_yaml(jobset.manifest(self.slices, arguments))

    def train(self, arguments: Sequence[str], workdir: str, pin: tuple[str, str] | None) -> int:
        """Applies the manifest, and follows the run until it is done or has failed.

        Kubernetes starts the run again after a preemption, a lost host and exit code 75.

        Raises:
          UserError: another run has this name.
        """
        if pin:
            raise UserError(
                "tpu train: on GKE the image holds the code; build it from the commit instead"
                " of --commit (see docs/launching.md)"
            )
        self._apply(jobset.manifest(self.slices, arguments), on_one_line(arguments))
        return self.look_until(self._look_at_run)

    def _apply(self, manifest: dict, line: str) -> None:
        found = self._jobset()
        if found and not _ended(found):
            told = found["metadata"].get("annotations", {}).get(jobset.ARGUMENTS)
            if told == line:
                return
            raise UserError(
                f"another run is going on {self.slices.name}: {told};"
                f" {program()} tpu stop {self.slices.name} lets it save and end"
            )
        if found:  # The fields of a JobSet cannot be changed.
            self.stop()
        text = jobset.to_yaml(manifest)
        self.shell.ask(self._kubectl("apply", "--filename=-"), stdin=text)

    def _jobset(self) -> dict | None:
        command = self._kubectl("get", "jobset", self.slices.name, "--output=json")
        try:
            return self._answer(command) or None
        except UserError as error:
            if _KUBECTL_GONE in str(error):
                return None
            raise

    def _answer(self, command: Command) -> dict:
        """Returns what a command prints as JSON; {} where it prints nothing.

        Raises:
          UserError: it prints something else, or fails.
        """
        text = self.shell.ask(command).strip()
        try:
            return json.loads(text or "{}")
        except ValueError:
            words = " ".join(command[:3])
            raise UserError(f"{words} prints no JSON: {quoted(text)}") from None

    def _look_at_run(self) -> int | None:
        if self.shell.dry_run:
            self._last_line()
            return 0
        found = self._jobset()
        if found is None:
            raise Unusable(f"{self.slices.name} has no JobSet any more: somebody deleted it")
        ended = _ended(found)
        name = self.slices.name
        if ended == "Completed":
            self.shell.say(f"{name}: done{self.costs()}")
            return 0
        if ended:
            code, line = self._failure()
            self.shell.say(f"{name} ended with {code}: {line}")
            self.shell.say(f"{name}: ended{self.costs()}")
            return code
        restarts = found.get("status", {}).get("restarts", 0)
        if restarts:
            self.tell(name, f"started again {restarts} times")
        self.tell(f"{name}-{jobset.JOB}-0-0", self._last_line())
        return None

    def _last_line(self) -> str:
        try:
            told = self.shell.ask(self._logs("--tail=1"))
        except UserError:  # The pod does not run yet, or not at this moment.
            return ""
        return told.strip()

    def _failure(self) -> tuple[int, str]:
        """Returns the exit code of a pod that failed, and the last line of its log.

        The pods that were ended because another one had failed have other codes than that one.
        """
        pods = self._answer(self._pods("--output=json")).get("items", [])
        failed = [
            (code, pod["metadata"]["name"])
            for pod in pods
            for status in pod.get("status", {}).get("containerStatuses", [])
            if (code := status.get("state", {}).get("terminated", {}).get("exitCode", 0))
        ]
        if not failed:
            return 1, "see kubectl describe jobset"
        code, pod = min(failed, key=lambda found: found[0] not in jobset.FINAL_CODES)
        return code, self.shell.ask(self._kubectl("logs", pod, "--tail=1")).strip()

    def logs(self, number: int, worker: str) -> None:
        """Shows the log of one pod until it ends."""
        self.shell.show(self._logs("--follow", "--tail=200", number=number, worker=worker))

    def _logs(self, *flags: str, number: int = 0, worker: str = "0") -> Command:
        labels = [
            f"jobset.sigs.k8s.io/jobset-name={self.slices.name}",
            f"jobset.sigs.k8s.io/job-index={number}",
            f"batch.kubernetes.io/job-completion-index={worker}",
        ]
        chosen = f"--selector={','.join(labels)}"
        return self._kubectl("logs", chosen, f"--container={jobset.CONTAINER}", *flags)

    def _pods(self, *flags: str) -> Command:
        selector = f"--selector=jobset.sigs.k8s.io/jobset-name={self.slices.name}"
        return self._kubectl("get", "pods", selector, *flags)

    def status(self) -> None:
        """Prints the JobSet and its pods as kubectl does."""
        self.shell.run(self._kubectl("get", "jobset", self.slices.name, "--ignore-not-found=true"))
        self.shell.run(self._pods("--output=wide"))

    def stop(self) -> None:
        """Deletes the JobSet; its pods get SIGTERM, on which the run saves. The nodes stay."""
        words = ("delete", "jobset", self.slices.name, "--ignore-not-found=true", "--wait=true")
        self.shell.run(self._kubectl(*words, "--cascade=foreground"), CREATE_SECONDS)

    def delete(self) -> None:
        """Deletes the run and the node pools, which cost, also where no run can be deleted."""
        try:
            self.stop()
        except UserError as error:  # Such as a cluster without JobSets, or one out of reach.
            self.shell.say(f"{error}; deleting the node pools all the same")
        for node in self.slices.nodes:
            self.shell.run(self._pool("delete", node), CREATE_SECONDS, _GCLOUD_GONE)
        if self._has_policy():
            words = ("compute", "resource-policies", "delete", self.slices.name)
            region = f"--region={self.slices.region}"
            self.shell.run(self._gcloud(*words, region), tolerate=_GCLOUD_GONE)
        if not self.shell.dry_run:
            slices_lib.forget(self.slices.name)

    def check(self, workdir: str) -> int:
        """Runs the measurements as a JobSet of their own, and prints one table.

        Raises:
          UserError: a run is going on the nodes.
        """
        found = self._jobset()
        if found and not _ended(found):
            raise UserError(
                f"a run is going on {self.slices.name}, whose nodes a check needs;"
                f" {program()} tpu stop {self.slices.name} lets it save and end"
            )
        name = f"{self.slices.name}-check"
        own = GkeLauncher(dataclasses.replace(self.slices, name=name), self.shell, self.poll)
        bucket = [f"--workdir={workdir}"] if workdir else []
        run = ("python", "-m", "vit_jax.launch.measure")
        own._apply(jobset.manifest(own.slices, bucket, run, once=True), on_one_line(bucket))
        try:
            told = own._measured()
        finally:
            own.stop()
        if self.shell.dry_run:
            return 0
        hosts = self.slices.known_shape().hosts
        pods = {
            f"{name}-{jobset.JOB}-{number}-{host}"
            for number in range(self.slices.slices)
            for host in range(hosts)
        }
        text, code = table(told, [], pods, self.slices.shape)
        show(text)
        return code

    def _measured(self) -> str:
        """Returns the output of all pods once they have ended, or time is up."""
        until = time.monotonic() + CHECK_SECONDS

        def look() -> int | None:
            is_over = self.shell.dry_run or _ended(self._jobset() or {})
            return 0 if is_over or time.monotonic() > until else None

        self.look_until(look)
        try:
            return self.shell.ask(self._logs_of_all())
        except Failed as error:  # A pod that has not started has no log; the others have.
            self.shell.say(str(error))
            return error.output

    def _logs_of_all(self) -> Command:
        selector = f"--selector=jobset.sigs.k8s.io/jobset-name={self.slices.name}"
        flags = ("--tail=-1", "--max-log-requests=1000", "--ignore-errors=true")
        return self._kubectl("logs", selector, *flags)

    def _kubectl(self, *arguments: str) -> Command:
        slices = self.slices
        flags = [f"--namespace={slices.namespace}"] if slices.namespace else []
        if slices.cluster:  # The name that `get-credentials` gives.
            place = slices.location or slices.zone
            flags.append(f"--context=gke_{self._known_project()}_{place}_{slices.cluster}")
        return ["kubectl", *arguments, *flags]

    def _known_project(self) -> str:
        """Returns the project of the cluster: --project, or the one that gcloud uses."""
        if not self._project:
            self._project = self.slices.project or self.shell.ask_first(
                "PROJECT", ["gcloud", "config", "get", "project"]
            )
        if not self._project:
            raise UserError("gcloud has no project; add --project")
        return self._project

    def _pool(self, action: str, node: str, *flags: str) -> Command:
        cluster = f"--cluster={self.slices.cluster}"
        return self._gcloud("container", "node-pools", action, node, cluster, self._where(), *flags)

    def _where(self) -> str:
        return f"--location={self.slices.location or self.slices.zone}"

    def _gcloud(self, *arguments: str) -> Command:
        project = self.slices.project
        where = [f"--project={project}"] if project else []
        return gcloud(*arguments, *where, "--quiet")


def _ended(found: dict) -> str:
    """Returns Completed or Failed for a JobSet that has ended; "" for one that has not."""
    for condition in found.get("status", {}).get("conditions", []):
        if condition["type"] in ("Completed", "Failed") and condition["status"] == "True":
            return condition["type"]
    return ""


def launcher(slices: Slices, shell: Shell, poll: float) -> GkeLauncher:
    """Returns the launcher of node pools and JobSets."""
    return GkeLauncher(slices, shell, poll)
