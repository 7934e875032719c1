"""The JobSet manifest of a run on GKE, and a writer of YAML for it.

Fields: jobset.sigs.k8s.io/docs/reference/jobset.v1alpha2 and
kubernetes.io/docs/reference/kubernetes-api/workload-resources/job-v1; labels and limits of TPU
nodes: docs.cloud.google.com/kubernetes-engine/docs/how-to/tpu-multislice.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from vit_jax.errors import UserError
from vit_jax.launch.launcher import on_one_line
from vit_jax.launch.slices import Slices

JOB = "slice"
"""The name of the replicated job, of which each replica is one slice."""

CONTAINER = "train"

ARGUMENTS = "vit-jax/arguments"
"""The annotation that holds the arguments of the run, by which the launcher knows it."""

MAX_RESTARTS = 1000
"""Preemptions count as restarts, so that a long run on Spot capacity needs many."""

GRACE_SECONDS = 300
"""The time from SIGTERM to SIGKILL. A Spot node that is taken away gives its pods less: the first
15 of 30 s, or of up to 120 s where the node pool is configured so
(docs.cloud.google.com/kubernetes-engine/docs/concepts/spot-vms)."""

FINAL_CODES = (1, 2, 3)
"""Exit codes of errors that would come again (`vit_jax.errors`)."""

_RUN = ("python", "-m", "vit_jax", "train")


def manifest(
    slices: Slices, arguments: Sequence[str], run: Sequence[str] = _RUN, *, once: bool = False
) -> dict[str, Any]:
    """Returns the JobSet of a run.

    Args:
      arguments: the arguments of the command `train`; they reach it as they are, without a shell.
      run: the command before the arguments.
      once: starts every pod once; one that fails does not end the others.

    Raises:
      UserError: the type is not one of GKE, or the image is missing.
    """
    if not slices.image:
        raise UserError(
            "--image is missing: the container image of the run, which the Dockerfile makes"
        )
    metadata: dict[str, Any] = {
        "name": slices.name,
        # A slice is a node pool, which has one slice: its pods go to the nodes of one pool.
        "annotations": {
            "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool",
            ARGUMENTS: on_one_line(arguments),
        },
    }
    if slices.namespace:
        metadata["namespace"] = slices.namespace
    if slices.labels:
        metadata["labels"] = dict(part.partition("=")[::2] for part in slices.labels.split(","))
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": metadata,
        "spec": {
            "failurePolicy": {
                "maxRestarts": 0 if once else MAX_RESTARTS,
                "rules": [
                    # A pod ended with a code of `FINAL_CODES`.
                    {
                        "name": "final",
                        "action": "FailJobSet",
                        "onJobFailureReasons": ["PodFailurePolicy"],
                    }
                ],
            },
            "replicatedJobs": [
                {
                    "name": JOB,
                    "replicas": slices.slices,
                    "template": {"spec": _job(slices, _pod(slices, arguments, run), once)},
                }
            ],
        },
    }


def _job(slices: Slices, pod: Mapping[str, Any], once: bool) -> dict[str, Any]:
    hosts = slices.known_shape().hosts
    return {
        "completionMode": "Indexed",
        "completions": hosts,
        "parallelism": hosts,
        # One lost pod ends the job: the others cannot go on without it.
        **({"backoffLimitPerIndex": 0} if once else _ends_together()),
        "template": {"spec": pod},
    }


def _ends_together() -> dict[str, Any]:
    """Returns the fields of a job that ends with the first of its pods that fails."""
    rules = [
        # A pod of a node that is taken away, whatever code it ends with.
        {"action": "Count", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
        {
            "action": "FailJob",
            "onExitCodes": {
                "containerName": CONTAINER,
                "operator": "In",
                "values": list(FINAL_CODES),
            },
        },
    ]
    return {"backoffLimit": 0, "podFailurePolicy": {"rules": rules}}


def _pod(slices: Slices, arguments: Sequence[str], run: Sequence[str]) -> dict[str, Any]:
    shape = slices.known_shape()
    if not shape.tpu.node_label:
        raise UserError(f"--type={slices.type}: GKE has v4 and later")
    selector = {
        "cloud.google.com/gke-tpu-accelerator": shape.tpu.node_label,
        "cloud.google.com/gke-tpu-topology": shape.shape,
    }
    tolerations = [{"key": "google.com/tpu", "operator": "Exists", "effect": "NoSchedule"}]
    if slices.is_spot:
        selector["cloud.google.com/gke-spot"] = "true"
        tolerations.append(
            {"key": "cloud.google.com/gke-spot", "operator": "Equal", "value": "true",
             "effect": "NoSchedule"}
        )  # fmt: skip
    chips = str(shape.chips // shape.hosts)
    pod: dict[str, Any] = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": GRACE_SECONDS,
        "nodeSelector": selector,
        "tolerations": tolerations,
        "containers": [
            {
                "name": CONTAINER,
                "image": slices.image,
                "command": list(run),
                "args": [_literal(argument) for argument in arguments],
                # Ports of JAX's coordinator, libtpu and its coordinator of several slices.
                "ports": [{"containerPort": port} for port in (8482, 8471, 8080)],
                "resources": {
                    "requests": {"google.com/tpu": chips},
                    "limits": {"google.com/tpu": chips},
                },
            }
        ],
    }
    if slices.service_account:
        pod["serviceAccountName"] = slices.service_account
    return pod


def _literal(argument: str) -> str:
    """Returns an argument that is as it was once Kubernetes has put variables into it.

    It puts a variable in the place of `$(NAME)`, and `$` in the place of `$$`.
    """
    return argument.replace("$", "$$")


_PLAIN = re.compile(r"[A-Za-z_][\w./@-]*")
_WORDS = {"true", "false", "null", "yes", "no", "on", "off", "y", "n"}


def to_yaml(value: Any) -> str:
    """Returns mappings, lists, texts and numbers as YAML.

    The launcher runs before anything is installed, so that it has no package for YAML.
    """
    return "\n".join(_lines(value)) + "\n"


def _lines(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping) and value:
        for key, entry in value.items():
            yield from _entry(f"{_scalar(key)}:", entry)
    elif isinstance(value, list) and value:
        for entry in value:
            first, *rest = _lines(entry)
            yield f"- {first}"
            yield from (f"  {line}" for line in rest)
    else:
        yield _scalar(value)


def _entry(key: str, value: Any) -> Iterator[str]:
    if isinstance(value, Mapping | list) and value:
        yield key
        yield from (f"  {line}" for line in _lines(value))
    else:
        yield f"{key} {_scalar(value)}"


def _scalar(value: Any) -> str:
    if isinstance(value, str) and _PLAIN.fullmatch(value) and value.lower() not in _WORDS:
        return value
    if isinstance(value, str):
        return f'"{"".join(map(_escaped, value))}"'
    return json.dumps(value)  # Which YAML contains.


def _escaped(letter: str) -> str:
    if " " <= letter <= "~" and letter not in '"\\':
        return letter
    return f"\\U{ord(letter):08X}"
