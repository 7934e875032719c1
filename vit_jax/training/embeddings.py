"""Pictures of frozen features: patch tokens as colors, the nearest neighbors of a few images.

A teacher that follows the student is published; how the student looks at images is drawn beside it.
"""

from collections.abc import Mapping

import jax
import numpy as np

from vit_jax.report import Section
from vit_jax.tasks import BaseTask
from vit_jax.types import Array, Features, Params

NUM_COLORED = 8
"""The number of images whose patch tokens are drawn."""
NUM_SEARCHED = 256
"""The number of images among which neighbors are looked for."""
_QUERIES, _NEIGHBORS, _CHUNK = 4, 5, 32


def sections(task: BaseTask, params: Params, examples: Mapping[str, np.ndarray]) -> list[Section]:
    """Returns the sections of the report about features; those that do not apply are left out.

    Args:
      params: of the model, on the host.
      examples: arrays of the pipeline; `image` of at most `NUM_SEARCHED` examples.
    """
    from vit_jax.report import figures  # matplotlib, which training can do without

    vectors, grids = features(task, params, examples["image"])
    images = [figures.displayable(image) for image in examples["image"]]
    found = []
    if grids is not None and min(grids.shape[1:3]) > 1:
        colors = component_colors(grids)
        pairs = [
            np.concatenate([image, enlarged(color, image.shape[:2])], axis=1)
            for image, color in zip(images, colors, strict=False)
        ]
        text = (
            "Each image beside its patches, whose colors are the first three principal components"
            " of the tokens of all these images (Oquab et al. 2023, DINOv2): patches of one color"
            " are alike to the model."
        )
        figure = figures.image_grid(pairs, columns=4)
        alt = f"{len(pairs)} images, each beside a picture of its patches in colors."
        found.append(Section("Patches as colors", text, figure, alt=alt))
    if len(images) > 1:
        order, cosines = nearest(vectors)
        shown, titles = [], []
        for query in range(len(order)):
            shown.append(images[query])
            titles.append("image")
            shown += [images[other] for other in order[query]]
            titles += [f"{value:.2f}" for value in cosines[query]]
        text = (
            f"The first images, and those of the first {len(images)} whose features are nearest,"
            " with the cosine of their angle. Cosines near 1 everywhere are the sign of a collapse."
        )
        columns = 1 + order.shape[1]
        figure = figures.image_grid(shown, titles, columns=columns)
        alt = f"Rows of an image and its {order.shape[1]} nearest images, with their cosines."
        found.append(Section("Nearest neighbors", text, figure, alt=alt))
    return found


def student_section(
    task: BaseTask, params: Params, examples: Mapping[str, np.ndarray]
) -> list[Section]:
    """Returns the attention of a student whose teacher is published, or [] without attention."""
    from vit_jax import attention
    from vit_jax.errors import UserError

    inputs = jax.device_get(task.inputs(examples))
    try:
        maps = attention.attention_maps(task.model, params, inputs)
    except UserError:
        return []
    text = (
        "The student, from which the published teacher is averaged: its attention, and attention"
        " followed through all layers. The teacher's is above."
    )
    figure = attention.panel(examples["image"], maps, task.summaries(examples))
    return [Section("Where the student looks", text, figure, alt=attention.PANEL_IN_WORDS)]


def features(
    task: BaseTask, params: Params, images: np.ndarray
) -> tuple[np.ndarray, np.ndarray | None]:
    """Returns vectors `[n, dim]` of images, and the grids of tokens of the first `NUM_COLORED`.

    The grids are `[images, rows, columns, width]`, or None for a model without a grid.
    """
    backbone = task.model.backbone

    @jax.jit
    def computed(params: Params, images: np.ndarray) -> tuple[Array, Array | None]:
        found: Features = backbone.apply({"params": params}, task.inputs({"image": images}))
        return found.vector(), found.grid

    own, vectors, grids = jax.device_put(params["backbone"]), [], None
    for start in range(0, len(images), _CHUNK):
        chunk = images[start : start + _CHUNK]
        missing = min(_CHUNK, len(images)) - len(chunk)  # One shape, so that one compile serves.
        padded = np.concatenate([chunk, np.repeat(chunk[-1:], missing, axis=0)])
        vector, grid = jax.device_get(computed(own, padded))
        vectors.append(vector[: len(chunk)])
        if start == 0 and grid is not None:
            grids = np.asarray(grid[: min(NUM_COLORED, len(chunk))], np.float32)
    return np.concatenate(vectors), grids


def component_colors(grids: np.ndarray) -> np.ndarray:
    """Returns colors uint8 `[n, rows, columns, 3]` of tokens `[n, rows, columns, width]`.

    They are the first three principal components over all tokens, each stretched between its 2nd
    and its 98th percentile. The sign of a component is the one with which its longest end is
    bright.
    """
    rows = grids.reshape(-1, grids.shape[-1]).astype(np.float64)
    rows = rows - rows.mean(0)
    _, vectors = np.linalg.eigh(rows.T @ rows)
    components = rows @ vectors[:, ::-1][:, :3]
    low, high = np.percentile(components, (2, 98), axis=0)
    components = np.where(-low > high, -components, components)
    low, high = np.percentile(components, (2, 98), axis=0)
    shares = ((components - low) / np.maximum(high - low, 1e-12)).clip(0, 1)
    shares = np.pad(shares, [(0, 0), (0, 3 - shares.shape[1])])
    return np.round(255 * shares).astype(np.uint8).reshape(*grids.shape[:-1], 3)


def enlarged(colors: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Returns a picture `[rows, columns, 3]` enlarged to `size`, without smoothing."""
    rows, columns = (
        np.arange(new) * old // new for new, old in zip(size, colors.shape[:2], strict=True)
    )
    return colors[rows][:, columns]


def nearest(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the numbers and cosines of the nearest others of the first vectors, nearest first."""
    unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    queries = min(_QUERIES, len(unit))
    cosines = unit[:queries] @ unit.T
    cosines[np.arange(queries), np.arange(queries)] = -np.inf
    order = np.argsort(-cosines, axis=1, kind="stable")[:, : min(_NEIGHBORS, len(unit) - 1)]
    return order, np.take_along_axis(cosines, order, axis=1)
