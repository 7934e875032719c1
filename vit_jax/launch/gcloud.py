"""Commands of gcloud, under the release track that has their flags.

Some flags exist only in the alpha or beta form of a command. The tables are those of the pages
docs.cloud.google.com/sdk/gcloud/reference/alpha/... and .../beta/... A flag that has become
generally available since then is still one of alpha's and beta's.
"""

from collections.abc import Sequence

from vit_jax.errors import UserError
from vit_jax.launch.shell import Command

ALPHA, BETA = "alpha", "beta"

PREVIEWS: dict[str, dict[str, tuple[str, ...]]] = {
    "compute tpus tpu-vm create": {
        ALPHA: ("autocheckpoint-enabled", "image", "provisioning-model", "reservation"),
    },
    "compute tpus queued-resources create": {
        ALPHA: (
            "autocheckpoint-enabled", "best-effort", "max-run-duration", "network-config",
            "provisioning-model", "reservation", "workload-type",
        ),
    },
    "compute tpus tpu-vm ssh": {ALPHA: ("batch-size", "tunnel-through-iap")},
    "compute tpus tpu-vm scp": {ALPHA: ("batch-size", "tunnel-through-iap")},
    "compute instance-templates create": {
        BETA: (
            "enable-display-device", "graceful-shutdown", "graceful-shutdown-max-duration",
            "maintenance-interval", "mesh", "partner-metadata", "partner-metadata-from-file",
            "post-key-revocation-action-type",
        ),
        ALPHA: (
            "enable-watchdog-timer", "ipv6-address", "ipv6-prefix-length", "local-nvdimm",
            "numa-node-count", "on-host-maintenance", "subnet-region",
        ),
    },
    "container node-pools create": {
        BETA: ("disable-pod-cidr-overprovision", "ephemeral-storage", "local-ssd-encryption-mode"),
        ALPHA: ("linux-sysctls", "local-ssd-volumes"),
    },
}  # fmt: skip
"""Command → track → the flags that the command has in this track, but not in the one before.

The tracks are the general one, beta, and alpha, which has the flags of all three.
"""

_OWN = {
    **{f"--{flag}": f"--{flag}" for flag in (
        "zone", "project", "spot", "provisioning-model", "reservation", "max-run-duration",
    )},
    **dict.fromkeys(("--region", "--node-locations"), "--zone"),
    **{f"--{flag}": f"--{flag}" for flag in ("location", "cluster")},
    "--preemptible": "--spot",
    **dict.fromkeys(("--accelerator-type", "--topology", "--machine-type", "--tpu-topology",
                     "--num-nodes"), "--type"),
    **dict.fromkeys(("--node-count", "--node-id", "--node-prefix"), "--slices"),
}  # fmt: skip
"""Flags of gcloud that would make slices other than the launcher knows → its own flags for them."""


def gcloud(*words: str) -> Command:
    """Returns a command of gcloud, of the first release track that has all of its flags."""
    line = " ".join(words)
    previews = next((found for name, found in PREVIEWS.items() if line.startswith(f"{name} ")), {})
    given = {_name(word) for word in words}
    track = next((track for track in (ALPHA, BETA) if given & {*previews.get(track, ())}), "")
    return ["gcloud", *([track] if track else []), *words]


def _name(word: str) -> str:
    """Returns the name of the flag in a word of a command; "" for other words."""
    name = word.partition("=")[0]
    return name.removeprefix("--").removeprefix("no-") if name.startswith("--") else ""


def check_passed(flags: Sequence[str]) -> None:
    """Raises a `UserError` if a flag after `--` would make slices that the launcher does not know.

    It would look for them in another place, or take them for slices of another kind.
    """
    if flags and not flags[0].startswith("-"):
        raise UserError(f"-- {flags[0]}: only flags are handed on, such as -- --metadata=KEY=VALUE")
    for flag in flags:
        own = _OWN.get(flag.partition("=")[0])
        if own:
            raise UserError(f"-- {flag}: write {own} before the --, which the launcher reads")
