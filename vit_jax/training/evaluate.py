"""Exact metrics over whole splits, equal for any batch size, mesh and number of processes."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vit_jax import checkpoints, data, tasks
from vit_jax.checkpoints.keep_best import KeepBest
from vit_jax.checkpoints.store import Store
from vit_jax.config.validation import complete_probes
from vit_jax.errors import UserError, quoted
from vit_jax.parallel import sharding
from vit_jax.tasks import BaseTask
from vit_jax.tracking.metrics import best_metric
from vit_jax.training import agreement, probes, sgd_probes, step
from vit_jax.training.class_names import check_labels, class_names
from vit_jax.training.learned import Learned, warn_of_other_statistics
from vit_jax.training.neighbors import Labelled
from vit_jax.training.run import Run, open_source
from vit_jax.training.workdir import Workdir
from vit_jax.types import Array, Batch, DataInfo, Features, HostBatch, Params

CACHE_BYTES = 256 << 20
"""The most bytes of a decoded split that stay in host memory between evaluations."""


class Abandoned(Exception):
    """An evaluation was stopped before its end."""


@dataclasses.dataclass
class Split:
    """One entry of `config.eval.sets`: a source, its preprocessing and its cached batches."""

    name: str
    source: data.Source
    pp: str
    cached: list[dict[str, np.ndarray]] | None = None


class Evaluator:
    """Evaluates parameters on every configured split.

    task: whose `eval_sums`, `eval_rows` and `metrics` are used. abstract: the state's shapes and
    shardings.
    """

    def __init__(self, config: ConfigDict, task: BaseTask, abstract: step.State, mesh: Mesh):
        ways = math.prod(mesh.shape[axis] for axis in sharding.BATCH_AXES)
        wanted = config.eval.batch_size or config.batch_size
        self.batch_size = -(-wanted // ways) * ways
        self.splits = [open_split(config, name) for name in config.eval.sets]
        for split in self.splits:
            _check_meanings(split, task)
        self._task = task
        self._mesh = mesh
        self._threads = config.data.threads
        self._timeout_s = config.data.timeout
        self._rows = sharding.local_rows(mesh, self.batch_size)
        self._inference_params = jax.jit(task.inference_params)
        self._precompute = jax.jit(task.precompute, out_shardings=sharding.replicated(mesh))
        self.abstract = _inference_params(task, abstract.params, mesh)
        self._sums = jax.jit(task.eval_sums)  # Used only for shapes, which it caches.
        computed = self._precompute.eval_shape(self.abstract)
        everywhere = jax.tree.map(lambda _: sharding.replicated(mesh), computed)
        computed = _with_shardings(computed, everywhere)
        self.step = step.make_eval_step(task, {**self.abstract, **computed}, mesh)
        self._probes = complete_probes(config.eval.probes.to_dict())
        self._known = self._open_probes(config) if self._probes else None
        classes = self._known.source.num_classes if self._known else 0
        classes = classes or task.info.num_classes
        self._patches = sgd_probes.PatchProbes(task, mesh, self._probes, classes)
        self._embed = jax.jit(self._vectors, out_shardings=sharding.replicated(mesh))

    @property
    def measures_features(self) -> bool:
        """True if features are what the run is for: it has probes, or its task reads no labels."""
        return "backbone" in self.abstract and (
            self._known is not None or not self._task.learns_classes
        )

    def _open_probes(self, config: ConfigDict) -> Split:
        """Opens the images that probes know. Raises `UserError` if probes cannot measure them."""
        known = _open(config, "probes", self._probes)
        is_fit = has_labels(known) or (has_marks(known) and self._probes.get("rates"))
        if "backbone" not in self.abstract or not is_fit:
            raise UserError(
                "config.eval.probes measures the backbone of a model on images with one label each,"
                " or with `rates` on segmentations; the model has no such part, or the images no"
                " such labels"
            )
        if self._probes.get("rates"):
            sgd_probes.check(self._task.model.backbone, self._probes)
        for split in filter(has_labels, self.splits):
            place = f"config.eval.sets.{split.name}"
            check_labels(place, split.source, "config.eval.probes", known.source)
        return known

    def run(
        self, params: Params, *, suffix: str = "", should_stop: Callable[[], bool] = lambda: False
    ) -> dict[str, float]:
        """Returns `{"NAME/metric": value}` over all splits; NAME is that of the split and `suffix`.

        Raises:
          Abandoned: `should_stop` returned True between two batches.
        """
        params = self.prepared(params)
        results = {}
        for split in self.splits:
            found = self._statistics(split, params, should_stop)
            for metric, value in self._task.metrics(found).items():
                results[f"{split.name}{suffix}/{metric}"] = value
        return results | self._probed(params, suffix, should_stop)

    def _probed(
        self, params: Params, suffix: str, should_stop: Callable[[], bool]
    ) -> dict[str, float]:
        """Returns the metrics of `config.eval.probes` on the splits with labels, or {}."""
        if self._known is None:
            return {}
        if not has_labels(self._known):
            return self._segmented(params, suffix, should_stop)
        known, source = self._features(self._known, params, should_stop), self._known.source
        train = Labelled(known["feature"], known["label"])
        classes = source.num_classes or int(train.labels.max()) + 1
        self._probes = probes.possible(train, classes, self._probes, source.class_names)
        measured, kept = {}, {}
        for split in filter(has_labels, self.splits):
            rows = self._features(split, params, should_stop)
            test = Labelled(rows["feature"], rows["label"])
            measured[split.name] = probes.measure(train, test, classes, self._probes)
            if self._probes.get("rates"):  # They are trained once for all splits.
                kept[split.name] = rows
        if kept:
            trained = sgd_probes.accuracies(known, kept, classes, self._probes)
            measured = {name: measured[name] | trained[name] for name in measured}
        return _named(measured, suffix)

    def _segmented(
        self, params: Params, suffix: str, should_stop: Callable[[], bool]
    ) -> dict[str, float]:
        """Returns the metrics of linear classifiers of patches, on splits with segmentations."""
        assert self._known is not None

        def opened(split: Split) -> Callable[[], Iterator[dict[str, Array]]]:
            return lambda: self._placed(split, should_stop)

        splits = {split.name: opened(split) for split in filter(has_marks, self.splits)}
        known = opened(self._known)
        return _named(self._patches.measure(params["backbone"], known, splits), suffix)

    def sources(self) -> dict[str, data.Source]:
        """Returns the sources of the splits and of the probes by their sections of the config."""
        found = {f"eval.sets.{split.name}": split.source for split in self.splits}
        return found if self._known is None else found | {"eval.probes": self._known.source}

    def _features(
        self, split: Split, params: Params, should_stop: Callable[[], bool]
    ) -> dict[str, np.ndarray]:
        """Returns the vectors of the backbone for a split's images, and their labels.

        Every process gets all of them: `feature`, `label`, and what the classifiers of SGD read.

        Raises:
          Abandoned: `should_stop` returned True between two batches.
        """
        with sharding.activate(self._mesh):
            placed = self._placed(split, should_stop)
            parts = [jax.device_get(self._embed(params["backbone"], one)) for one in placed]
        return join_rows(parts)

    def _placed(self, split: Split, should_stop: Callable[[], bool]) -> Iterator[dict[str, Array]]:
        """Yields a split's batches on the devices. Raises `Abandoned`."""
        for batch in self.batches(split):
            if should_stop():
                raise Abandoned
            yield self.place(batch)

    def _vectors(self, params: Params, batch: Batch) -> dict[str, Array]:
        backbone, images = self._task.model.backbone, self._task.inputs(batch)
        found: Features = backbone.apply({"params": params}, images)
        rows = {"feature": found.vector(), "label": batch["label"], "mask": batch["mask"]}
        if not self._probes.get("rates"):
            return rows
        return rows | sgd_probes.class_rows(backbone, params, images, self._probes)

    def prepared(self, params: Params) -> Params:
        """Returns the parameters that the evaluation reads, with those that it computes once.

        Args:
          params: those of a run, or of its model alone, over the whole mesh.
        """
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.abstract)
        with sharding.activate(self._mesh):
            params = sharding.moved(self._inference_params(params), shardings)
            return {**params, **self._precompute(params)}

    def _statistics(
        self, split: Split, params: Params, should_stop: Callable[[], bool]
    ) -> Mapping[str, np.ndarray]:
        sums, parts = None, []
        with sharding.activate(self._mesh):
            for placed in self._placed(split, should_stop):
                if sums is None:
                    with self._naming_fields(split, placed):
                        sums = self.zeros(params, placed)
                sums, rows = self.step(params, placed, sums)
                parts.append(rows)
        if sums is None:
            raise UserError(f"config.eval.sets.{split.name} has no examples")
        return {**jax.device_get(sums), **join_rows(jax.device_get(parts))}

    @contextlib.contextmanager
    def _naming_fields(self, split: Split, batch: Batch) -> Iterator[None]:
        """Converts the error of a task that finds no field in a batch to a `UserError`."""
        try:
            yield
        except KeyError as error:
            field = error.args[0] if error.args else None
            if field in batch or field not in self._task.info.spec:
                raise
            raise UserError(
                f"config.eval.sets.{split.name}: its examples have no {field!r}, which evaluation"
                " compares outputs with"
            ) from error

    def place(self, batch: HostBatch) -> dict[str, Array]:
        """Returns this process's rows of a batch, on the devices."""
        return sharding.place(batch, self._rows, self._mesh, self.batch_size)

    def zeros(self, params: Params, batch: Batch) -> dict[str, Any]:
        """Returns the zeros that the sums of a split start from."""
        shapes = self._sums.eval_shape(params, batch)
        zeros = {name: np.zeros(s.shape, s.dtype) for name, s in shapes.items()}
        return jax.device_put(zeros, sharding.replicated(self._mesh))

    def batches(self, split: Split) -> Iterator[dict[str, np.ndarray]]:
        """Yields this process's rows of a split's batches, in host memory."""
        if split.cached is not None:
            yield from split.cached
            return
        kept: list[dict[str, np.ndarray]] | None = []
        size = 0
        with data.eval_batches(
            split.source,
            batch_size=self.batch_size,
            rows=self._rows,
            pp=split.pp,
            num_threads=self._threads,
            timeout_s=self._timeout_s,
        ) as batches:
            for batch in batches:
                size += sum(array.nbytes for array in batch.values())
                kept = None if kept is None or size > CACHE_BYTES else [*kept, batch]
                yield batch
        split.cached = kept

    def examples(self, split: Split, params: Params, limit: int) -> dict[str, np.ndarray]:
        """Returns the first `limit` examples of a split, with predictions.

        Every process gets all of them.
        """
        predict = jax.jit(
            lambda params, batch: (batch, self._task.predict(params, batch)),
            out_shardings=sharding.replicated(self._mesh),
        )
        parts: list[dict[str, np.ndarray]] = []
        params = self.prepared(params)
        with sharding.activate(self._mesh):
            for number, batch in enumerate(self.batches(split)):
                if number * self.batch_size >= limit:
                    break
                placed = self.place(batch)
                inputs, outputs = jax.device_get(predict(params, placed))
                parts.append({**inputs, **outputs})
        return {name: array[:limit] for name, array in join_rows(parts).items()}


def _named(found: Mapping[str, Mapping[str, float]], suffix: str) -> dict[str, float]:
    """Returns `{"SPLIT/METRIC": value}` of `{split: {metric: value}}`, the suffix after a split."""
    return {
        f"{name}{suffix}/{metric}": value
        for name, values in found.items()
        for metric, value in values.items()
    }


def join_rows(parts: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Joins batches of rows; leaves out the mask, and the rows whose mask is 0."""
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    real = joined.pop("mask", np.ones(0)) > 0
    return {name: array[real] for name, array in joined.items()}


def step_of(store: Store, config: ConfigDict, wanted: int | str | None) -> int:
    """Returns the step of a run's checkpoint that a user wants.

    Args:
      wanted: its number; "best" for the one that `config.checkpoint.keep_best` kept; None for the
        newest.

    Raises:
      UserError: there is no such checkpoint.
    """
    if wanted is None:
        return store.newest()
    steps = store.steps()
    if wanted != "best":
        if str(wanted) not in map(str, steps):
            raise UserError(
                f"{store.directory} has no step {quoted(str(wanted))[1:-1]}; it has {steps}"
            )
        return int(wanted)
    name = config.checkpoint.keep_best
    metric_info = tasks.metric_info(config.task.name)
    metric = best_metric(name, metric_info, config.checkpoint.best_is)
    choose = max if metric and metric.higher_is_better else min
    best = KeepBest(store.directory, name, choose).best(dict.fromkeys(steps)) if metric else None
    if best is None:
        raise UserError(
            f"{store.directory}: this run kept no best checkpoint; train with"
            f" config.checkpoint.keep_best=SPLIT/METRIC, or write one of the steps {steps}"
        )
    return best


def evaluate_workdir(
    workdir: Workdir,
    overrides: Mapping[str, Any],
    at: int | str | None = None,
    trust: Sequence[str] = (),
) -> dict[str, float]:
    """Returns the metrics of a run's checkpoint on the evaluation splits of the run.

    overrides: config keys to change, such as `eval.batch_size` or `data.dir`. at: the step, see
    `step_of`. trust: names of code from outside this package that the run's config names and that
    may run.

    Raises:
      UserError: no such checkpoint, it is damaged, or of a model of other shapes.
    """
    config = workdir.read_config(overrides, trust)
    run = Run.build(config)
    evaluator = Evaluator(config, run.task, run.abstract, run.mesh)
    store = Store(workdir.checkpoints)
    at = step_of(store, config, at)
    workdir.check_classes(class_names(run.task))
    agreement.check(run, evaluator.sources(), at)
    restored = store.restore(at, run.abstract)
    for section in ("params", "ema", "task_state"):
        restored.check_whole(section)
    if run.optimizer.rule.evaluation_params:
        restored.check_whole("opt_state")
    state = restored.tree
    found = evaluator.run(run.evaluation_params(state))
    if state.ema is not None:
        found |= evaluator.run(state.ema, suffix="_ema")
    return found


def evaluate_checkpoint(config: ConfigDict, path: str) -> dict[str, float]:
    """Returns metrics of a checkpoint of any format on the evaluation splits of a config.

    Raises:
      UserError: the checkpoint does not fit the config's model, or has no head of its own.
    """
    run = Run.build(config)
    if change := Learned.of(path).change(class_names(run.task)):
        raise UserError(f"{path} was trained for other classes: {change}")
    height, width, channels = run.task.image_spec.shape
    sizes: Any = {"image_size": (height, width), "channels": channels}
    params, _ = checkpoints.load_with_report(path, run.task.model, head="keep", lazy=True, **sizes)
    warn_of_other_statistics(run.task, path)
    evaluator = Evaluator(config, run.task, run.abstract, run.mesh)
    agreement.check(run, evaluator.sources(), path)
    return evaluator.run(jax.tree.map(sharding.place_whole, params, evaluator.abstract))


def _inference_params(task: BaseTask, params: Params, mesh: Mesh) -> Params:
    """Returns shapes and shardings of the inference parameters, given those of all parameters."""
    shapes = jax.eval_shape(task.inference_params, params)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, params)
    return _with_shardings(shapes, sharding.shardings_like(shapes, params, shardings, mesh))


def _with_shardings(shapes: Params, shardings: Params) -> Params:
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        shapes,
        shardings,
    )


def open_first_split(config: ConfigDict) -> Split:
    """Returns the first set of `config.eval.sets`. Raises `UserError` if there is none."""
    if not config.eval.sets:
        raise UserError("config.eval.sets is empty; write the set of images to measure on")
    return open_split(config, next(iter(config.eval.sets)))


def open_split(config: ConfigDict, name: str) -> Split:
    """Opens the split `config.eval.sets.NAME`; `config.data` has the keys that it leaves out."""
    return _open(config, name, dict(config.eval.sets[name]))


def _open(config: ConfigDict, name: str, entry: Mapping[str, Any]) -> Split:
    spec = {
        key: entry.get(key, config.data[key]) for key in ("source", "name", "dir", "split", "args")
    }
    return Split(name, open_source(spec), entry.get("pp", config.data.eval_pp))


def has_labels(split: Split) -> bool:
    """Returns whether each image of a split has one label, the number of a class."""
    label = data.element_spec(split.source, split.pp).get("label")
    return label is not None and label.shape == () and np.dtype(label.dtype).kind in "iu"


def has_marks(split: Split) -> bool:
    """Returns whether each pixel of a split has a class."""
    return "segmentation" in data.element_spec(split.source, split.pp)


def _check_meanings(split: Split, task: BaseTask) -> None:
    """Compares a split's classes and vocabularies with those of the training data.

    Labels of images are numbers of `config.task.classes` where the task is given such words.
    """
    place, words = f"config.eval.sets.{split.name}", tuple(getattr(task, "classes", ()))
    if words and has_labels(split):
        known = DataInfo({}, len(words), words)
        check_labels(place, split.source, "config.task.classes", known)
    elif task.learns_classes:
        known = DataInfo({}, task.info.num_classes, class_names(task))
        check_labels(place, split.source, "config.data", known)
    for name, vocab in data.vocabularies(split.pp).items():
        learned = task.info.spec[name].vocab if name in task.info.spec else ""
        if learned and vocab != learned:
            raise UserError(
                f"config.eval.sets.{split.name} tokenizes with {vocab!r}, config.data.pp with"
                f" {learned!r}; write one of them in both"
            )
