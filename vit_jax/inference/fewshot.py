"""Evaluates frozen features by linear classifiers and by nearest neighbors.

The module computes a model's features of a training and a test split; `ridge`, `neighbors` and
`sgd_probes` of `vit_jax.training` have the measures, which `config.eval.probes` gives during
training. Nothing is trained by gradients unless `config.eval.probes.rates` has learning rates.
"""

import functools
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from vit_jax import data, tasks
from vit_jax.config.schema import PROBES
from vit_jax.config.validation import complete_probes
from vit_jax.errors import UserError
from vit_jax.inference.features import Embedder, backbone_params
from vit_jax.parallel import sharding
from vit_jax.tasks import BaseTask
from vit_jax.training import sgd_probes
from vit_jax.training.class_names import check_labels
from vit_jax.training.evaluate import (
    Split,
    has_labels,
    has_marks,
    join_rows,
    open_first_split,
)
from vit_jax.training.learned import warn_of_other_statistics
from vit_jax.training.neighbors import NEIGHBORS, Labelled, accuracy, neighbor_votes
from vit_jax.training.ridge import (
    L2_REGS,
    SEEDS,
    SHOTS,
    draw_shots,
    few_shot,
    least_squares,
)
from vit_jax.training.run import open_source
from vit_jax.types import Array, DataInfo, Features, Params

__all__ = [
    "L2_REGS",
    "SEEDS",
    "SHOTS",
    "accuracy",
    "draw_shots",
    "few_shot",
    "least_squares",
    "run",
]


def run(
    config: ConfigDict,
    *,
    shots: Sequence[int] = SHOTS,
    seeds: Sequence[int] = SEEDS,
    l2_regs: Sequence[float] = L2_REGS,
) -> dict[str, float]:
    """Returns accuracies of the features of `config.init.checkpoint` on the config's data.

    The training examples are those of `config.data`, preprocessed by `eval_pp`, whatever
    `config.eval.probes.split` says. The test examples are all those of the first set of
    `config.eval.sets`. The head is not used.

    Returns:
      `SETNAME/fewshot_N/l2_R` for each number of examples per class that all classes have, averaged
      over the seeds; `SETNAME/linear/l2_R` for all examples; `SETNAME/knn_K` for K nearest
      neighbors, and `SETNAME/knn`, that of 20. With `config.eval.probes.rates`, `SETNAME/sgd_N` of
      the last N blocks; of data with segmentations and without labels there is only
      `SETNAME/sgd_miou_N`.

    Raises:
      UserError: there is no checkpoint or evaluation set, images do not have exactly one label
        each, or labels mean other classes in the two sets.
    """
    if not config.init.checkpoint:
        raise UserError("config.init.checkpoint is empty; write whose features to measure")
    split = open_first_split(config)
    source = open_source(config.data)
    check_labels(f"config.eval.sets.{split.name}", split.source, "config.data", source)
    info = DataInfo(
        data.element_spec(source, config.data.eval_pp), source.num_classes, source.class_names
    )
    task = tasks.build(config.task, config.model, info)
    warn_of_other_statistics(task, config.init.checkpoint)
    params = backbone_params(task, config.init.checkpoint, config.init.interpolation)
    settings = _settings(config, task)
    places = {"train": Split("train", source, config.data.eval_pp), "test": split}
    if settings and not has_labels(places["train"]) and has_marks(places["train"]):
        found = _segmented(task, params, places, config, settings)
        return {f"{split.name}/{name}": value for name, value in found.items()}
    embed = Embedder(task, params, functools.partial(_computed, settings=settings))
    rows = {name: _rows(embed, place, config) for name, place in places.items()}
    train, test = (Labelled(found["feature"], found["label"]) for found in rows.values())
    classes = source.num_classes
    least = int(np.bincount(train.labels, minlength=classes).min())
    if max(shots) > least:
        logging.warning("the smallest class has %d examples: no more shots than that", least)
    shots = [count for count in shots if count <= least]
    found = few_shot(train, test, classes, shots=shots, seeds=seeds, l2_regs=l2_regs)
    found |= {
        f"linear/l2_{l2:g}": accuracy(scores, test.labels)
        for l2, scores in least_squares(train, test.features, classes, l2_regs).items()
    }
    for count, votes in neighbor_votes(train, test.features, classes, counts=NEIGHBORS).items():
        found[f"knn_{count}"] = accuracy(votes, test.labels)
    found["knn"] = found["knn_20"]
    if settings:
        tests = {"test": rows["test"]}
        found |= sgd_probes.accuracies(rows["train"], tests, classes, settings)["test"]
    return {f"{split.name}/{name}": value for name, value in found.items()}


def _settings(config: ConfigDict, task: BaseTask) -> Mapping[str, Any]:
    """Returns `config.eval.probes` complete if it has learning rates, else {}."""
    given = config.eval.probes.to_dict()
    if not given.get("rates"):
        return {}
    own = {key: value for key, value in given.items() if key in PROBES}
    settings = complete_probes({**own, "split": config.data.split})
    sgd_probes.check(task.model.backbone, settings)
    return settings


def _batches(split: Split, config: ConfigDict, size: int) -> Iterator[dict[str, np.ndarray]]:
    rows, threads = np.arange(size), config.data.threads
    with data.eval_batches(
        split.source, batch_size=size, rows=rows, pp=split.pp, num_threads=threads
    ) as batches:
        yield from batches


def _computed(
    backbone: Any, params: Params, images: Array, settings: Mapping[str, Any]
) -> dict[str, Array]:
    """Returns `feature` `[batch, dim]` of images, and what the classifiers of SGD read."""
    found: Features = backbone.apply({"params": params}, images)
    rows = {"feature": found.vector()}
    if not settings:
        return rows
    return rows | sgd_probes.class_rows(backbone, params, images, settings)


def _rows(embed: Embedder, split: Split, config: ConfigDict) -> dict[str, np.ndarray]:
    """Returns what `embed` computes of all images, arrays by name, and `label`."""
    parts = []
    for batch in _batches(split, config, config.eval.batch_size or config.batch_size):
        label = batch.get("label")
        if label is None or label.ndim != 1 or label.dtype.kind not in "iu":
            raise UserError(
                f"{split.source.fingerprint}: few-shot learning wants one label an image"
            )
        given = {name: batch[name] for name in ("label", "mask")}
        parts.append({**embed(batch["image"]), **given})
    return join_rows(parts)


def _segmented(
    task: BaseTask,
    params: Any,
    places: Mapping[str, Split],
    config: ConfigDict,
    settings: Mapping[str, Any],
) -> dict[str, float]:
    """Returns the metrics of linear classifiers of patches on the test set."""
    mesh = sharding.data_mesh(jax.local_devices())
    size = -(-(config.eval.batch_size or config.batch_size) // mesh.size) * mesh.size
    placed = sharding.batch_sharding(mesh)

    def opened(name: str) -> Iterator[Any]:
        return (jax.device_put(one, placed) for one in _batches(places[name], config, size))

    classes = places["train"].source.num_classes or task.info.num_classes
    probes = sgd_probes.PatchProbes(task, mesh, settings, classes)
    own = jax.device_put(params["backbone"], sharding.replicated(mesh))
    tests = {"test": functools.partial(opened, "test")}
    return probes.measure(own, functools.partial(opened, "train"), tests)["test"]
