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
from vit_jax.checkpoints.manifest import DamagedError, Saved
from vit_jax.errors import CannotSave, UserError, is_out_of_memory
from vit_jax.parallel.processes import lost_process
from vit_jax.types import Array

RETRY_SECONDS = 1.0
"""Pause before a failed save is tried again; twice as long after each further failure."""

_LEAST_PART = 1 << 20
"""Bytes from which on the devices that hold an array write a part of it each."""

logger = logging.getLogger(__name__)

MAX_DAMAGED = 2
"""Newest checkpoints that may be passed over; more is no accident, and the run should not go on."""


@dataclasses.dataclass(frozen=True)
class Restored:
    """A restored state and what was noticed on the way.

    tree: like the abstract tree that was asked for; leaves absent from the checkpoint are None.
    missing: names of those leaves. ignored: names in the checkpoint that nothing asked for.
    damaged: lines about newer checkpoints that were passed over.
    """

    step: int
    tree: Any
    metadata: Mapping[str, Any]
    missing: tuple[str, ...]
    ignored: tuple[str, ...]
    damaged: tuple[str, ...] = ()

    def check_whole(self, section: str) -> None:
        """Raises `UserError` if a leaf of `section` is missing."""
        lacking = [name for name in self.missing if name.startswith(f"{section}.")]
        if lacking:
            more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
            raise UserError(
                f"the checkpoint of step {self.step} has no {lacking[0]}{more} of the shape that"
                " the config asks for; give the config it was trained with"
            )


class Store:
    """The checkpoints of one run, `DIRECTORY/STEP/`, saved in the background.

    Keeps the newest `keep_last` and, of the saves that come with metrics, the best by `keep_best`:
    the one with the largest value, or with `least_is_best` the smallest.

    A save that could not be written is tried again up to `retries` times in a row, after pauses
    that double: with the same state where it still exists, else with that of a later step. One of
    several processes gives up at once, for the others would not know.
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
            best = preservation_policy.BestN(
                get_metric_fn=lambda metrics: metrics[keep_best],
                n=1,
                reverse=least_is_best,
                keep_checkpoints_without_metrics=False,
            )
            policies.append(best)
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
        """Steps with a finished checkpoint, ascending."""
        if not self.directory.exists():
            return []
        return sorted(int(path.name) for path in self.directory.iterdir() if path.name.isdigit())

    def newest(self) -> int:
        """The newest step with a checkpoint.

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
        """Starts saving; returns when the arrays have left the device and may be reused.

        Raises:
          UserError: it, or the one before it, could not be written, however often it was tried; or
            nothing can be written below a directory of that name.
        """
        storage.check_writable_name(self.directory, str(self.directory))
        self._last = _Save(step, flatten(tree), dict(metadata), dict(metrics) if metrics else None)
        try:
            self._finish()
        except _orbax_errors() as error:  # Of the save before, which this one stands in for.
            self._failed(error)
        self._start()

    def must_retry(self) -> bool:
        """Whether the last save turned out to have failed, and another is due."""
        if jax.process_count() > 1:  # Looking waits for the others, who may not look now.
            return False
        if self._pending and not self.is_busy():
            try:
                self._finish()
            except _orbax_errors() as error:
                self._failed(error, pause=False)
        return self._manager is None and self._failures > 0 and time.monotonic() >= self._retry_at

    def is_busy(self) -> bool:
        """Whether a save is still being written."""
        return self._manager is not None and self._manager.is_saving_in_progress()

    def _start(self) -> None:
        while True:
            try:
                return self._start_once(self._last)
            except _orbax_errors() as error:
                self._failed(error)

    def _start_once(self, save: "_Save") -> None:
        if self._manager is None:
            handlers = {"state": _state_handler(), "manifest": ocp.JsonCheckpointHandler()}
            self._manager = ocp.CheckpointManager(
                self.directory, options=self._options, item_handlers=handlers
            )
        described = manifest.describe(save.step, save.arrays, save.metadata)
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
        """Returns when the last save is on disk.

        Raises:
          UserError: it could not be written; the checkpoint before it is whole.
        """
        while True:
            try:
                return self._finish()
            except _orbax_errors() as error:
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
        """Notes a failed save.

        Raises:
          UserError: it was the last that may fail.
          CannotSave: it is one of several processes'.
        """
        # Orbax drops the other writes of a save that failed, which Python would tell at its exit.
        warnings.filterwarnings("ignore", ".* was never awaited", RuntimeWarning)
        self._failures += 1
        if jax.process_count() > 1:  # The others know nothing of it.
            raise CannotSave(f"{self._cannot_save(error)}; start all again") from error
        if self._failures > self._retries:
            raise self._cannot_save(error) from error
        with contextlib.suppress(*_orbax_errors()):
            self._manager.close()
        # The next manager clears away what this one has left.
        self._manager, self._pending = None, False
        seconds = RETRY_SECONDS * 2 ** (self._failures - 1)
        self._retry_at = time.monotonic() + seconds
        logger.warning("cannot save a checkpoint (%s); trying again", _first_line(error))
        if pause:
            time.sleep(seconds)

    def _cannot_save(self, error: Exception) -> UserError:
        last = f"the last good one is step {self.steps()[-1]}" if self.steps() else "none is saved"
        return UserError(
            f"cannot save a checkpoint in {self.directory}: {_first_line(error)}; {last}"
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
            logger.warning("%s", _first_line(error))

    def restore_newest(self, abstract: Any) -> Restored | None:
        """The newest whole checkpoint, or None where there is no checkpoint at all.

        Damaged newer ones are renamed `STEP.damaged`, so that their steps can be saved again.

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
        """The checkpoint of `step`, onto the shardings of `abstract`.

        abstract: a tree of `jax.ShapeDtypeStruct` with shardings. Leaves whose name or shape the
        checkpoint does not have come back as None; those of another dtype are cast.

        Raises:
          DamagedError: a file is missing, cut short or changed; it says which steps are left.
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
        saved, metadata = manifest.read(path)
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
    """Orbax's, but for how it writes arrays that several devices hold.

    By default each of them cuts its part out of every array, by programs that are compiled and run
    one after the other while training waits. That pays for large arrays only.
    """
    handlers = ocp.type_handlers
    arrays = handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=_LEAST_PART)
    registry = handlers.create_type_handler_registry(
        (np.ndarray, handlers.NumpyHandler()), (jax.Array, arrays)
    )
    return ocp.PyTreeCheckpointHandler(type_handler_registry=registry)


def _orbax_errors() -> tuple[type[Exception], ...]:
    """What Orbax raises where files cannot be written."""
    return (*storage.errors(), ValueError)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:300]


def flatten(tree: Any) -> dict[str, Any]:
    """Leaves by dotted name: fields and keys, never positions that a change could shift."""
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
        if isinstance(error, MemoryError) or is_out_of_memory(error) or lost_process(error):
            raise  # These say nothing about the files.
        # Broken files surface as any kind of error from the readers below.
        raise DamagedError(f"{path}: {_first_line(error)}") from error


def _verify(path: epath.Path, arrays: Mapping[str, Array], saved: Mapping[str, Saved]) -> None:
    found = checksums(arrays)
    changed = [name for name, value in found.items() if value != saved[name].checksum]
    if changed:
        more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        raise DamagedError(f"{path}/state: the bytes of {changed[0]}{more} have changed")
