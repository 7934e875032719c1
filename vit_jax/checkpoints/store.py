"""Checkpoints of our own format: Orbax writes the arrays, names and checksums are added here.

A state is saved as a flat dictionary, `{"params.backbone.norm.scale": array, ...}`, and restored by
name, so that a run whose optimizer gained or lost a stage resumes with what the two have in common.

Every restore is verified, because Orbax alone returns flipped bytes without a word. The checksum of
each array is computed on the devices that hold its shards, and the manifest stores it.
"""

import contextlib
import dataclasses
import logging
import time
import warnings
from collections.abc import Mapping
from typing import Any

import flax.serialization
import flax.traverse_util
import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import preservation_policy

from vit_jax import storage
from vit_jax.checkpoints import manifest
from vit_jax.checkpoints.checksums import checksums
from vit_jax.checkpoints.keep_best import KeepBest
from vit_jax.checkpoints.manifest import DamagedError, Saved
from vit_jax.errors import CannotSave, UserError, first_line, is_out_of_memory
from vit_jax.parallel.processes import lost_process
from vit_jax.types import Array

RETRY_SECONDS = 1.0
"""The pause before a failed save is tried again; it doubles after each further failure."""

_LEAST_PART = 1 << 20
"""Arrays of at least this many bytes are written in parts by all devices that hold them."""

logger = logging.getLogger(__name__)

MAX_DAMAGED = 2
"""The most damaged checkpoints that are passed over; more are no accident, and end the run."""


@dataclasses.dataclass(frozen=True)
class Restored:
    """A restored state, and its differences from what was asked for.

    Attributes:
      tree: like the abstract tree that was asked for; leaves that the checkpoint lacks are None.
      metadata: as it was given to `Store.save`.
      missing: the names of the leaves that the checkpoint lacks.
      ignored: the names in the checkpoint that were not asked for.
      damaged: a line about each newer checkpoint that was passed over.
      restarted: the names of update rules whose state starts anew, because parts of it are missing.
    """

    step: int
    tree: Any
    metadata: Mapping[str, Any]
    missing: tuple[str, ...]
    ignored: tuple[str, ...]
    damaged: tuple[str, ...] = ()
    restarted: tuple[str, ...] = ()

    def check_whole(self, section: str) -> None:
        """Raises a `UserError` if a leaf of `section` is missing."""
        lacking = [name for name in self.missing if name.partition(".")[0] == section]
        if lacking:
            more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
            raise UserError(
                f"the checkpoint of step {self.step} has no {lacking[0]}{more} of the shape that"
                " the config asks for; give the config it was trained with"
            )


class Store:
    """The checkpoints of one run, `DIRECTORY/STEP/`, saved in the background.

    A save that could not be written is tried again up to `retries` times in a row, after pauses
    that double: with the same state if it still exists, or else with that of a later step. One of
    several processes gives up at once, because the others would not know of its failure.

    Args:
      directory: local or on an object store; made by the first save.
      keep_last: the number of newest checkpoints to keep.
      keep_best: the metric by which the best of the saves that come with metrics is kept too; ""
        for none.
      least_is_best: whether the smallest value of that metric is the best.
      retries: the most failures in a row after which a save is tried again.
    """

    def __init__(
        self,
        directory: epath.PathLike,
        *,
        keep_last: int = 2,
        keep_best: str = "",
        least_is_best: bool = False,
        retries: int = 3,
    ):
        self.directory = storage.literal(directory)
        policies = [preservation_policy.LatestN(keep_last)]
        if keep_best:
            policies.append(KeepBest(self.directory, keep_best, min if least_is_best else max))
        self._options = ocp.CheckpointManagerOptions(
            preservation_policy=preservation_policy.AnyPreservationPolicy(policies),
            enable_async_checkpointing=True,
            cleanup_tmp_directories=True,
        )
        self._manager: ocp.CheckpointManager | None = None
        self._retries = retries
        self._pending = False
        self._failures = 0
        self._retry_at = 0.0
        self._last: _Save | None = None

    def steps(self) -> list[int]:
        """Returns the steps with a finished checkpoint, ascending.

        Raises:
          UserError: the directory cannot be read.
        """
        try:
            if not self.directory.exists():
                return []
            names = [path.name for path in self.directory.iterdir()]
        except storage.errors() as error:
            raise UserError(f"{self.directory} cannot be read: {first_line(error)}") from error
        return sorted(int(name) for name in names if name.isdecimal())

    def newest(self) -> int:
        """Returns the newest step with a checkpoint.

        Raises:
          UserError: there is none.
        """
        steps = self.steps()
        if not steps:
            raise UserError(f"{self.directory} holds no checkpoint; train first")
        return steps[-1]

    def save(
        self,
        step: int,
        tree: Any,
        metadata: Mapping[str, Any],
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Starts a save, and returns when the memory of the arrays may be reused.

        Raises:
          UserError: this save, or the one before it, could not be written after all retries; or
            nothing can be written below a directory of that name.
        """
        storage.check_writable_name(self.directory, str(self.directory))
        self._last = _Save(step, flatten(tree), dict(metadata), dict(metrics) if metrics else None)
        try:
            self._finish()
        except _orbax_errors() as error:  # From the save before, which this one replaces.
            self._failed(error)
        self._start()

    def must_retry(self) -> bool:
        """Returns whether the last save has failed and another one is due."""
        if jax.process_count() > 1:  # Looking would wait for the other processes.
            return False
        if self._pending and not self.is_busy():
            try:
                self._finish()
            except _orbax_errors() as error:
                self._failed(error, pause=False)
        return self._manager is None and self._failures > 0 and time.monotonic() >= self._retry_at

    def is_busy(self) -> bool:
        """Returns whether a save is still being written."""
        return self._manager is not None and self._manager.is_saving_in_progress()

    def _start(self) -> None:
        while True:
            try:
                return self._start_once()
            except _orbax_errors() as error:
                self._failed(error)

    def _start_once(self) -> None:
        save = self._last
        assert save is not None
        if self._manager is None:
            handlers = {"state": _state_handler(), "manifest": ocp.JsonCheckpointHandler()}
            self._manager = ocp.CheckpointManager(
                self.directory, options=self._options, item_handlers=handlers
            )
        described = manifest.describe(save.step, save.arrays, save.metadata, save.metrics or {})
        self._manager.save(
            save.step,
            args=ocp.args.Composite(
                state=ocp.args.PyTreeSave(save.arrays), manifest=ocp.args.JsonSave(described)
            ),
            metrics=save.metrics,
            force=True,
        )
        self._pending = True

    def wait(self) -> None:
        """Waits until the last save is on disk.

        Raises:
          UserError: it could not be written; the checkpoint before it is whole.
        """
        while True:
            try:
                return self._finish()
            except _orbax_errors() as error:
                assert self._last is not None
                if any(array.is_deleted() for array in self._last.arrays.values()):
                    raise self._cannot_save(error) from error
                self._failed(error)
                self._start()

    def _finish(self) -> None:
        if self._manager is None:
            return
        self._manager.wait_until_finished()
        self._manager.check_for_errors()
        self._pending, self._failures = False, 0

    def _failed(self, error: Exception, *, pause: bool = True) -> None:
        """Prepares for another try after a failed save.

        Raises:
          UserError: no more failures are allowed.
          CannotSave: this is one of several processes.
        """
        # Orbax drops the other writes of a failed save, of which Python would warn at its exit.
        warnings.filterwarnings("ignore", ".* was never awaited", RuntimeWarning)
        self._failures += 1
        if jax.process_count() > 1:  # The others know nothing of it.
            raise CannotSave(f"{self._cannot_save(error)}; start all again") from error
        if self._failures > self._retries:
            raise self._cannot_save(error) from error
        with contextlib.suppress(*_orbax_errors()):
            if self._manager is not None:
                self._manager.close()
        # The next manager clears away what this one has left.
        self._manager, self._pending = None, False
        seconds = RETRY_SECONDS * 2 ** (self._failures - 1)
        self._retry_at = time.monotonic() + seconds
        logger.warning("cannot save a checkpoint (%s); trying again", first_line(error))
        if pause:
            time.sleep(seconds)

    def _cannot_save(self, error: Exception) -> UserError:
        last = f"the last good one is step {self.steps()[-1]}" if self.steps() else "none is saved"
        return UserError(
            f"cannot save a checkpoint in {self.directory}: {first_line(error)}; {last}"
        )

    def close(self) -> None:
        """Waits for the last save and stops the background threads.

        Raises:
          UserError: the last save could not be written.
        """
        manager, self._manager = self._manager, None
        if manager is None:
            return
        try:
            manager.close()
        except _orbax_errors() as error:
            raise self._cannot_save(error) from error

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        try:
            self.close()
        except Exception as error:
            if error_type is None:
                raise
            # The error that ended the run is the one to tell; this one is often its consequence.
            logger.warning("%s", first_line(error))

    def restore_newest(self, abstract: Any) -> Restored | None:
        """Restores the newest whole checkpoint; returns None if there is no checkpoint at all.

        Newer ones that are damaged are renamed `STEP.damaged`, so that their steps can be saved
        again.

        Raises:
          UserError: all checkpoints are damaged, or more than `MAX_DAMAGED` of the newest.
        """
        damaged: dict[int, str] = {}
        steps = self.steps()
        for step in reversed(steps):
            if len(damaged) > MAX_DAMAGED:
                break
            try:
                restored = self._restore(step, abstract)
            except DamagedError as error:
                damaged[step] = str(error)
                continue
            return dataclasses.replace(restored, damaged=self._set_aside(damaged))
        if damaged:
            lines = "; ".join(damaged.values())
            scope = "all" if len(damaged) == len(steps) else f"the newest {len(damaged)}"
            raise UserError(
                f"{scope} checkpoints in {self.directory} are damaged: {lines}. Nothing was"
                " changed; restore the files, or start in another workdir"
            )
        return None

    def _set_aside(self, damaged: Mapping[int, str]) -> tuple[str, ...]:
        lines = []
        for step, reason in damaged.items():
            path = self.directory / str(step)
            if jax.process_index() == 0:
                path.rename(self._free_name(f"{step}.damaged"))
            lines.append(f"{reason}; renamed {path.name}.damaged")
        if damaged and jax.process_count() > 1:
            multihost_utils.sync_global_devices("damaged checkpoints renamed")
        return tuple(lines)

    def _free_name(self, name: str) -> epath.Path:
        taken = {path.name for path in self.directory.iterdir()}
        names = (name, *(f"{name}.{number}" for number in range(1, len(taken) + 1)))
        return self.directory / next(name for name in names if name not in taken)

    def restore(self, step: int, abstract: Any) -> Restored:
        """Restores the checkpoint of `step` onto the shardings of `abstract`.

        Args:
          abstract: a tree of `jax.ShapeDtypeStruct` with shardings. Leaves whose name or shape the
            checkpoint does not have come back as None; those of another dtype are cast.

        Raises:
          DamagedError: a file is missing, cut short or changed; the message names the other steps.
          UserError: the checkpoint was written by a newer version of this package.
        """
        try:
            return self._restore(step, abstract)
        except DamagedError as error:
            others = [other for other in self.steps() if other != step]
            if not others:
                raise
            raise DamagedError(
                f"{error}; there are also {others}: `train` goes on from the newest that is whole,"
                " `evaluate --step=STEP` reads one of them"
            ) from error

    def _restore(self, step: int, abstract: Any) -> Restored:
        path = self.directory / str(step)
        saved, metadata, _ = manifest.read(path)
        asked = flatten(abstract)
        # Checksums are of the saved dtype, so arrays are read as they were saved, then cast.
        common = {
            name: leaf.update(dtype=saved[name].dtype)
            for name, leaf in asked.items()
            if name in saved and saved[name].shape == leaf.shape
        }
        arrays = _read(path, common)
        _verify(path, arrays, saved)
        arrays = {name: array.astype(asked[name].dtype) for name, array in arrays.items()}
        return Restored(
            step=step,
            tree=_unflatten_like(abstract, arrays),
            metadata=metadata,
            missing=tuple(sorted(asked.keys() - common.keys())),
            ignored=tuple(sorted(saved.keys() - common.keys())),
        )


@dataclasses.dataclass(frozen=True)
class _Save:
    """One call of `Store.save`."""

    step: int
    arrays: dict[str, Array]
    metadata: dict[str, Any]
    metrics: dict[str, float] | None


def _state_handler() -> ocp.PyTreeCheckpointHandler:
    """Returns Orbax's handler, with another rule for arrays that several devices hold.

    By default each of these devices cuts its part out of every array. The programs for that are
    compiled and run one after the other while training waits, which pays only for large arrays.
    """
    handlers = ocp.type_handlers
    arrays = handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=_LEAST_PART)
    registry = handlers.create_type_handler_registry(
        (np.ndarray, handlers.NumpyHandler()), (jax.Array, arrays)
    )
    return ocp.PyTreeCheckpointHandler(type_handler_registry=registry)


def _orbax_errors() -> tuple[type[Exception], ...]:
    """Returns the exceptions that Orbax raises if files cannot be written."""
    return storage.errors(ValueError)


def flatten(tree: Any) -> dict[str, Any]:
    """Returns the leaves of a tree by dotted name: names of fields and keys, never positions."""
    state = flax.serialization.to_state_dict(tree)
    flat = flax.traverse_util.flatten_dict(state, sep=".")
    return {name: leaf for name, leaf in flat.items() if leaf is not None}


def _unflatten_like(tree: Any, arrays: Mapping[str, Any]) -> Any:
    state = flax.serialization.to_state_dict(tree)
    flat = flax.traverse_util.flatten_dict(state, keep_empty_nodes=True)
    empty = flax.traverse_util.empty_node
    filled = {
        path: value if value is empty else arrays.get(".".join(path))
        for path, value in flat.items()
    }
    return flax.serialization.from_state_dict(tree, flax.traverse_util.unflatten_dict(filled))


def _read(path: epath.Path, abstract: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, Array]:
    if not abstract:
        return {}
    args = ocp.args.PyTreeRestore(
        item=dict(abstract),
        restore_args=ocp.checkpoint_utils.construct_restore_args(dict(abstract)),
        partial_restore=True,
    )
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            return checkpointer.restore(path / "state", args=args)
    except Exception as error:
        if is_out_of_memory(error) or lost_process(error):
            raise  # These say nothing about the files.
        # Broken files surface as any kind of error from the readers below.
        raise DamagedError(f"{path}: {first_line(error)}") from error


def _verify(path: epath.Path, arrays: Mapping[str, Array], saved: Mapping[str, Saved]) -> None:
    found = checksums(arrays)
    changed = [name for name, value in found.items() if value != saved[name].checksum]
    if changed:
        more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        raise DamagedError(f"{path}/state: the bytes of {changed[0]}{more} have changed")
