"""The files of a run besides checkpoints and metrics, and the rules for resuming it.

config.json   the resolved config, the command if the command line started the run, versions of
              packages and of this code, the devices, and the commits of what was read from the
              Hugging Face hub
DONE          exists once the last step is finished
"""

import contextlib
import dataclasses
import importlib.metadata
import json
import operator
import sys
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from vit_jax import config as config_lib
from vit_jax import plugins, storage
from vit_jax.checkpoints import files, hub
from vit_jax.config import schema, stages
from vit_jax.errors import UserError
from vit_jax.storage import write_atomically
from vit_jax.tracking.metrics import Metric, as_json
from vit_jax.training.class_names import difference
from vit_jax.types import ArraySpec, DataInfo
from vit_jax.version import current_commit

_MAX_NAMED = 5
_PROBE_BYTES = 1 << 16

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "tensorflow-cpu",
            "tensorflow", "tensorflow-datasets")  # fmt: skip

_UNRECORDED: Mapping[str, Any] = {
    "commit": None,
    "command": (),
    "packages": {},
    "devices": {},
    "metrics": {},
    "hub_commits": {},
}
"""What earlier versions did not record of a run."""


@dataclasses.dataclass(frozen=True)
class Workdir:
    """A run's directory, local or on an object store."""

    path: epath.Path

    @classmethod
    def open(cls, path: epath.PathLike) -> "Workdir":
        """Returns the directory, and creates it if it does not exist.

        Raises:
          UserError: it cannot be made or written to, or has a name that Orbax cannot write to.
        """
        if not storage.path_text(path, "workdir"):
            raise UserError("the workdir has no name; write a folder, or . for the current one")
        workdir = cls(storage.absolute(path))
        storage.check_writable_name(workdir.path, f"workdir={path}")
        # Processes of one run open it at the same time, so each one writes a different probe.
        probe = workdir.path / f".writable-{uuid.uuid4().hex}"
        try:
            workdir.path.mkdir(parents=True, exist_ok=True)
            try:
                # A full disk takes empty files.
                probe.write_bytes(bytes(_PROBE_BYTES))
            finally:
                probe.unlink(missing_ok=True)
        except storage.errors() as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"workdir={path}: cannot write there ({reason})") from error
        return workdir

    @classmethod
    def existing(cls, path: epath.PathLike) -> "Workdir":
        """Returns the directory of a run that has been started.

        Raises:
          UserError: there is no config.json.
        """
        workdir = cls(storage.absolute(path))
        if not workdir._config_file.exists():
            raise UserError(f"{path} holds no run (no config.json); train there first")
        return workdir

    @classmethod
    def containing(cls, path: epath.PathLike) -> "Workdir | None":
        """Returns the run that a checkpoint belongs to, or None if it belongs to no run.

        Args:
          path: a workdir, its folder of checkpoints, or one of its checkpoints.
        """
        name = storage.path_text(path)
        if storage.is_remote(name) and not name.startswith(("gs://", "s3://")):
            return None
        folder = storage.absolute(name)
        if not folder.is_dir():
            return None
        for workdir in map(cls, (folder, folder.parent, folder.parent.parent)):
            if workdir._config_file.exists() and workdir.checkpoints.exists():
                return workdir
        return None

    @classmethod
    def at(cls, path: epath.PathLike) -> "Workdir | None":
        """Returns the run whose workdir is `path`, or None if `path` is something else."""
        run = cls.containing(path)
        return run if run and run.path == storage.absolute(path) else None

    @property
    def checkpoints(self) -> epath.Path:
        return self.path / "checkpoints"

    @property
    def _config_file(self) -> epath.Path:
        return self.path / "config.json"

    @property
    def _done_file(self) -> epath.Path:
        return self.path / "DONE"

    def is_done(self) -> bool:
        """Returns whether the run's last step has been finished."""
        return self._done_file.exists()

    def mark_done(self, is_done: bool, text: str = "") -> None:
        """Writes `DONE`, or removes it when training continues."""
        if is_done:
            write_atomically(self._done_file, text.encode())
        else:
            self._done_file.unlink(missing_ok=True)

    def read_config(
        self, overrides: Mapping[str, Any] | None = None, trust: Sequence[str] = ()
    ) -> ConfigDict:
        """Returns the config of the run in the current schema, with `overrides` applied.

        Args:
          overrides: texts of the user's, by dotted key; code that they name is trusted.
          trust: names of code from outside this package, as in `my_models:Net`, that may run.

        Raises:
          UserError: the file is broken, of a newer version than this package, or names code from
            outside this package that the user has not named.
        """
        named = [trust] if isinstance(trust, str) else trust
        plugins.trust([*(overrides or {}).values(), *named])
        config = self._stored_config(overrides or {})
        config_lib.check_trust(config.to_dict(), str(self._config_file))
        return config

    def _stored_config(self, overrides: Mapping[str, Any]) -> ConfigDict:
        """Returns the config of the run for comparisons, whose named code need not be trusted."""
        return self._completed(self._read_stored(), overrides)

    def _completed(self, stored: tuple[Any, int], overrides: Mapping[str, Any]) -> ConfigDict:
        """Returns the result of `_read_stored` as a config of this version, with `overrides`."""
        with self._explained():
            config = config_lib.migrate(*stored)
        config_lib.apply_overrides(config, overrides)
        return config_lib.validate(config)

    def _read_stored(self) -> tuple[dict[str, Any], int]:
        """Returns the config of the run as it was written, and the version of its schema."""
        with self._explained():
            stored = files.read_json(self._config_file)
            return dict(stored["config"]), int(stored["version"])

    def read_record(self) -> dict[str, Any]:
        """Returns what `write_config` recorded, in the version in which it was written.

        Raises:
          UserError: the file is broken.
        """
        with self._explained():
            stored = files.read_json(self._config_file)
            return {**_UNRECORDED, **stored}

    def read_info(self) -> DataInfo:
        """Returns the description of the run's data that its task needs, without the data.

        Raises:
          UserError: the file is broken.
        """
        with self._explained():
            stored = files.read_json(self._config_file)["data_info"]
            spec = {
                # Earlier versions did not record vocabularies.
                name: ArraySpec(
                    tuple(map(operator.index, entry["shape"])),
                    np.dtype(entry["dtype"]),
                    entry.get("vocab", ""),
                )
                for name, entry in stored["spec"].items()
            }
            names = stored["class_names"]
            return DataInfo(spec, int(stored["num_classes"]), tuple(names) if names else None)

    def read_class_names(self) -> tuple[str, ...]:
        """Returns the names of the classes that the run learned; empty if it knows none."""
        with self._explained():
            stored = files.read_json(self._config_file)
            names = stored["config"]["task"].get("class_names")
            return tuple(map(str, names or stored["data_info"]["class_names"] or ()))

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Turns the exceptions of a broken `config.json` into a `UserError`."""
        try:
            yield
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise UserError(f"{self._config_file} cannot be read: {error!r}") from error

    def write_config(
        self,
        config: ConfigDict,
        info: DataInfo,
        headline: str,
        metric_info: Mapping[str, Metric],
        *,
        num_examples: int | None = None,
        command: Sequence[str] = (),
        devices: np.ndarray | None = None,
    ) -> None:
        """Records the config of the run, with the facts that are needed to repeat the run.

        Args:
          headline: the metric that the run is judged by.
          metric_info: the meaning of the metrics, for the report.
          num_examples: the number of training examples, if it is known.
          command: the words of the command that started the run; empty if Python code did.
          devices: the devices of JAX that the run computes on, all of one kind, if they are known.
        """
        record = {
            "version": config_lib.VERSION,
            "config": config.to_dict(),
            "data_info": {
                "spec": {
                    name: {**spec._asdict(), "dtype": str(spec.dtype)}
                    for name, spec in info.spec.items()
                },
                "num_classes": info.num_classes,
                "class_names": info.class_names,
                "num_examples": num_examples,
                "class_counts": info.class_counts,
            },
            "headline": headline,
            "metrics": as_json(metric_info),
            "command": list(command),
            "commit": current_commit(),
            "packages": _package_versions(),
            "devices": {} if devices is None else _description(devices),
            "hub_commits": {**hub.commits_in(config.to_dict()), **self._hub_commits()},
        }
        text = json.dumps(record, indent=2, default=str, allow_nan=False) + "\n"
        write_atomically(self._config_file, text.encode())

    def check_resume(self, config: ConfigDict) -> list[str]:
        """Returns a line about each key that differs from the run that is resumed, and may differ.

        Raises:
          UserError: a key differs that must not change while a run has checkpoints.
        """
        if not self._config_file.exists():
            return ["config.json is gone, so that neither keys nor classes are compared with it"]
        try:
            stored = self._read_stored()
        except UserError as error:
            raise UserError(
                f"{error}. Restore the file. If you delete it, training continues, but neither keys"
                " nor classes are compared with those of the run"
            ) from error
        before = self._completed(stored, {})
        found = config_lib.changes(before.to_dict(), config.to_dict())
        if found[schema.FIXED]:
            raise UserError(
                f"{self.path} has checkpoints of another run; these keys cannot change on resume:"
                f" {'; '.join(found[schema.FIXED])}. Restore them, or use another workdir"
            )
        return found[schema.WARNED]

    def check_classes(self, names: Sequence[str]) -> None:
        """Raises a `UserError` if the classes have other names, or another order, than in the run.

        Labels are numbers: a renamed folder of images would turn one class into another. Without
        the run's config there is nothing to compare with.
        """
        if not self._config_file.exists():
            return
        before = self.read_class_names()
        if before and names and (change := difference(before, names)):
            raise UserError(
                f"{self.path} was trained for other classes: {change}. Restore the names, or use"
                " another workdir"
            )

    def _hub_commits(self) -> dict[str, str]:
        """Returns the commits of the addresses of the hub that the run started from."""
        with self._explained():
            is_new = not self._config_file.exists()
            return {} if is_new else dict(files.read_json(self._config_file).get("hub_commits", {}))

    def changed_commits(self, config: ConfigDict) -> list[str]:
        """Returns a line about each address of the hub that no longer stands for its commit."""
        before, now = self._hub_commits(), hub.commits_in(config.to_dict())
        return [
            f"{address}: commit {before[address]} → {commit}"
            for address, commit in now.items()
            if before.get(address, commit) != commit
        ]

    def changed_stage(self, config: ConfigDict, num_examples: int, step: int) -> list[str]:
        """Returns a warning if a step is in another stage than it was in the run's own config."""
        if not self._config_file.exists():
            return []
        stored = self._completed(self._read_stored(), {})
        before, now = (stages.name_at(one, num_examples, step) for one in (stored, config))
        if before == now:
            return []
        return [f"stage of step {step:,}: {stages.title(before)} → {stages.title(now)}"]

    def changed_examples(self, num_examples: int, counts: Sequence[int] = ()) -> list[str]:
        """Returns a warning if the run was started with other training examples.

        Their number is compared, and the number of each class.

        Args:
          counts: the number of examples of each class, if the source knows it.
        """
        if not self._config_file.exists():
            return []
        with self._explained():
            stored = files.read_json(self._config_file)["data_info"]
            before, by_class = stored.get("num_examples"), stored.get("class_counts") or ()
            named = stored.get("class_names") or range(len(by_class))
            pairs = zip(named, by_class, counts, strict=False)  # Not every source counts classes.
            changed = [
                f"class {name!r}: {old:,} → {now:,}" for name, old, now in pairs if old != now
            ]
        if before not in (None, num_examples):
            changed.insert(0, f"training examples: {before:,} → {num_examples:,}")
        if not changed:
            return []
        more = f" and {len(changed) - _MAX_NAMED} others" if len(changed) > _MAX_NAMED else ""
        return [
            f"{', '.join(changed[:_MAX_NAMED])}{more}, so that batches are no longer those of an"
            " undisturbed run"
        ]


def _description(devices: np.ndarray) -> Mapping[str, Any]:
    """Returns the kind of the devices of a mesh, as JAX names it, and their number."""
    return {"kind": devices.flat[0].device_kind, "count": devices.size}


def _package_versions() -> Mapping[str, str]:
    versions = {"python": sys.version.split()[0]}
    for package in ("vit-jax", *PACKAGES):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
