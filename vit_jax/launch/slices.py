"""The TPU slices of one name: what was asked for, what state they are in, what is remembered."""

import dataclasses
import json
import os
import re
from pathlib import Path

from vit_jax.errors import UserError, first_line, program, quoted
from vit_jax.parallel import accelerators

READY, COMING, LOST, ABSENT, STOPPED = "READY", "COMING", "LOST", "ABSENT", "STOPPED"

_PLACE = ("backend", "cluster", "location", "zone", "project")
"""The fields that tell where slices are: a command for one place does not find those of another."""

_PROVISIONING = ("standard", "spot", "flex-start", "reservation-bound")


@dataclasses.dataclass(frozen=True)
class State:
    """The state of all slices of one name.

    Attributes:
      kind: READY; COMING, which changes by itself; LOST, taken away, so that the slices have to be
        created again; STOPPED, by somebody; ABSENT.
      told: the state in the words of the cloud, such as `PREEMPTED`.
      illness: the reason why the cloud calls a slice that is READY unhealthy; "" if it does not.
    """

    kind: str
    told: str
    illness: str = ""


def check_name(name: str) -> str:
    """Returns the name of a slice, which files here and on the hosts have too.

    Raises:
      UserError: the name is not valid for Google Cloud.
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
      type: the accelerator type, such as v5litepod-256, or a shape, such as v5e:16x16.
      backend: the name of the backend that creates them.
      version: the TPU runtime (Cloud TPU) or image family (Compute Engine); empty for the default.
      slices: the number of slices of that type, connected by the data center's network.
      queued: requests a queued resource of Cloud TPU, which waits for capacity; several slices
        always do so.
      provisioning_model: standard, spot, flex-start or reservation-bound.
      data_disk: disks to attach, as `gcloud compute tpus tpu-vm create --data-disk` takes them.
      iap: ssh goes through Identity-Aware Proxy.
      autocheckpoint: Cloud TPU sends SIGTERM before the maintenance of a host.
      image: the container image of GKE.
      cluster, location: the GKE cluster and its region or zone.
      namespace: the Kubernetes namespace.
      flags: further flags for the command that creates the slices, as they are.

    Raises:
      UserError: the name is not valid for Google Cloud, or another value is out of range.
    """

    name: str
    zone: str = ""
    type: str = ""
    backend: str = "cloud_tpu"
    project: str = ""
    version: str = ""
    spot: bool = False
    queued: bool = False
    slices: int = 1
    internal_ip: bool = False
    network: str = ""
    subnetwork: str = ""
    service_account: str = ""
    reservation: str = ""
    provisioning_model: str = ""
    max_run_duration: str = ""
    labels: str = ""
    tags: str = ""
    data_disk: tuple[str, ...] = ()
    iap: bool = False
    autocheckpoint: bool = False
    image: str = ""
    cluster: str = ""
    location: str = ""
    namespace: str = ""
    flags: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_name(self.name)
        model = self.provisioning_model
        if model not in ("", *_PROVISIONING):
            raise UserError(
                f"--provisioning-model={model}: write one of {', '.join(_PROVISIONING)}"
            )
        if self.spot and model not in ("", "spot"):
            raise UserError(f"--spot and --provisioning-model={model} exclude each other")
        if model == "reservation-bound" and not self.reservation:
            raise UserError("--provisioning-model=reservation-bound needs --reservation=NAME")
        if model == "flex-start" and self.reservation:
            raise UserError("--provisioning-model=flex-start and --reservation exclude each other")
        if self.slices < 1:
            raise UserError(f"--slices={self.slices}: write a number from 1 up")
        for field in ("data_disk", "flags"):  # JSON has no tuples.
            object.__setattr__(self, field, tuple(getattr(self, field)))

    @property
    def is_queued(self) -> bool:
        return self.queued or self.slices > 1

    @property
    def nodes(self) -> list[str]:
        """Returns the names of the slices."""
        if self.slices == 1:
            return [self.name]
        return [f"{self.name}-{number}" for number in range(self.slices)]

    @property
    def shape(self) -> accelerators.Slice | None:
        """Returns what a slice consists of; None if its type is not known here.

        Raises:
          UserError: the generation has no such size.
        """
        try:
            return accelerators.parse_slice(self.type)
        except UserError as error:
            raise UserError(f"--type={error}") from None

    def known_shape(self) -> accelerators.Slice:
        """Returns `shape`. Raises a `UserError` if the type is not known here."""
        shape = self.shape
        if shape is None:
            raise UserError(
                f"--type={self.type}: no such TPU type; write such as v6e-256 or tpu7x:4x4x4"
            )
        return shape

    @property
    def hosts(self) -> int:
        """Returns the number of hosts of one slice; 0 if it is not known."""
        return self.shape.hosts if self.shape else 0

    def refuse(self, *fields: str) -> None:
        """Raises a `UserError` if one of these fields, which the backend does not use, is set."""
        for field in fields:
            if getattr(self, field):
                backend = self.backend.replace("_", "-")
                raise UserError(f"--{field.replace('_', '-')} is not for --backend={backend}")

    @property
    def region(self) -> str:
        return self.zone.rpartition("-")[0]

    @property
    def is_spot(self) -> bool:
        return self.spot or self.provisioning_model == "spot"


def differing(known: Slices, wanted: Slices) -> str:
    """Returns the first field that says that slices lie elsewhere, or differ in type; else ""."""
    fields = (*_PLACE, "type")
    return next((f for f in fields if getattr(known, f) != getattr(wanted, f)), "")


def taken(known: Slices, field: str) -> UserError:
    """Returns the error that other slices, which differ in this field if any, have the name."""
    field = field or "type"
    value = getattr(known, field)
    flag = f"--{field}={value.replace('_', '-') if field == 'backend' else value}"
    what = f"of type {value}" if field == "type" else f"with {flag}" if value else f"without {flag}"
    return UserError(
        f"there is a {known.name} {what.removesuffix('=')} already; {program()} tpu delete it, or"
        " choose another name"
    )


def remember(slices: Slices) -> None:
    """Stores the description of created slices, so that later commands need only the name."""
    path = _memory(slices.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    # At once, because another launcher may read it.
    new = path.with_suffix(f".{os.getpid()}")
    new.write_text(json.dumps(dataclasses.asdict(slices), indent=1) + "\n")
    new.replace(path)


def recall(name: str) -> Slices | None:
    """Returns the slices that `remember` stored on this machine, or None.

    Raises:
      UserError: the file is damaged, or of another version of this package.
    """
    path = _memory(name)
    if not path.exists():
        return None
    usual = json.loads(json.dumps(dataclasses.asdict(Slices(name))))
    try:
        found = json.loads(path.read_bytes())
        for key, value in found.items():
            if type(value) is not type(usual.get(key)):
                raise ValueError(f"{key}={quoted(value)}")
        return Slices(**found)
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}: this is no description of slices ({first_line(error)}); delete the file, and"
            f" add the flags with which {name} was created"
        ) from error


def forget(name: str) -> None:
    _memory(name).unlink(missing_ok=True)


def _memory(name: str) -> Path:
    home = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(home) / "vit_jax" / "tpu" / f"{check_name(name)}.json"
