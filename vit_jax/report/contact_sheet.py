"""A picture of what a model sees: the images of a batch in a grid, each with its class name.

Boxes and segmentations are drawn on the images they belong to.
"""

from collections.abc import Iterable, Mapping, Sequence
from os import PathLike

import numpy as np
from PIL import Image, ImageDraw

from vit_jax.data.tokenizer import Tokenizer
from vit_jax.errors import UserError
from vit_jax.report import drawing

_MIN_TILE = 112
_GAP = 8
_BACKGROUND = (255, 255, 255)
_INK = (40, 40, 40)
_MIN_FRACTION = 0.1
"""The fraction of a soft label from which a class is named; smoothing gives every class a bit."""


def contact_sheet(
    batches: Iterable[dict[str, np.ndarray]],
    class_names: Sequence[str] | None,
    path: str | PathLike,
    *,
    num_images: int = 64,
    columns: int = 8,
    tokenizer: Tokenizer | None = None,
    title: str = "",
    originals: Iterable[dict[str, np.ndarray]] | None = None,
) -> int:
    """Draws the first images of `batches` and writes them as PNG.

    Args:
        batches: `image` uint8 or float `[b, h, w, 1 or 3]`, or crops `[b, crops, h, w, 1 or 3]` by
            any names, which are drawn side by side; `label` integers `[b]` or vectors
            `[b, classes]`, or a class for each pixel `[b, h, w]`; `segmentation`, or `boxes` and
            `box_label`, if there are any. Rows whose `mask` is 0 are left out. No more batches are
            taken than needed.
        class_names: names for the labels; None shows the numbers.
        path: the file to write.
        num_images: the number of images drawn; fewer if the batches end before.
        columns: the number of images in a row.
        tokenizer: decodes `tokens` `[b, length]`, whose texts are then the captions.
        title: a line above the images, which the size of the images is added to; "" for none.
        originals: batches of the same examples, whose `image` is drawn to the left of each image.

    Returns:
        The number of images drawn.

    Raises:
        UserError: the file cannot be written.
    """
    images, captions = _collect(batches, class_names, num_images, tokenizer)
    size = f"{images[0].shape[0]}×{images[0].shape[1]} pixels" if images else ""
    if originals is not None:
        before, _ = _collect(originals, None, num_images, None)
        images = [_beside(*pair) for pair in zip(before, images, strict=True)]
        size += ", each to the right of what it was made from"
    if not images:
        raise ValueError("no images to draw")
    sheet = _drawn(images, captions, columns, f"{title} · {size}" if title else "")
    try:
        sheet.save(path, "PNG")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error}") from error
    return len(images)


def _drawn(
    images: Sequence[np.ndarray], captions: Sequence[str], columns: int, title: str
) -> Image.Image:
    """Returns images uint8 `[h, w, 3]` in a grid, each above its caption, below a title."""
    font = drawing.font(13)
    height, width = images[0].shape[:2]
    # Whole multiples keep the pixels of tiny images square and sharp.
    zoom = max(1, -(-_MIN_TILE // max(height, width)))
    tile_width, tile_height = width * zoom, height * zoom
    step_x, step_y = tile_width + _GAP, tile_height + font.size + 2 * _GAP
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    top = _GAP + (font.size + 2 * _GAP if title else 0)
    sheet = Image.new("RGB", (columns * step_x + _GAP, rows * step_y + top), _BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    draw.text((_GAP, _GAP), drawing.fitted(title, font, sheet.width - 2 * _GAP), _INK, font)
    for number, (pixels, caption) in enumerate(zip(images, captions, strict=True)):
        x = _GAP + number % columns * step_x
        y = top + number // columns * step_y
        tile = Image.fromarray(pixels).resize((tile_width, tile_height), Image.Resampling.NEAREST)
        sheet.paste(tile, (x, y))
        draw.text((x, y + tile_height + 3), drawing.fitted(caption, font, tile_width), _INK, font)
    return sheet


def dimmed(
    batch: Mapping[str, np.ndarray], hidden: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Returns the batch with hidden patches of its images darker, to a fifth of their contrast.

    hidden: bool `[b, rows, columns]` or `[b, crops, rows, columns]` by the name of the images.
    """
    drawn = dict(batch)
    for name, patches in hidden.items():
        images = np.asarray(batch[name])
        rows, columns = (
            np.arange(new) * old // new
            for new, old in zip(images.shape[-3:-1], patches.shape[-2:], strict=True)
        )
        covered = patches[..., rows, :][..., columns][..., None]
        dark = (images.min() + 0.2 * (images - images.min())).astype(images.dtype)
        drawn[name] = np.where(covered, dark, images)
    return drawn


def _collect(
    batches: Iterable[dict[str, np.ndarray]],
    class_names: Sequence[str] | None,
    num_images: int,
    tokenizer: Tokenizer | None,
) -> tuple[list[np.ndarray], list[str]]:
    """Returns RGB pixels `[h, w, 3]` and captions of the first rows that are not padding."""
    images: list[np.ndarray] = []
    captions: list[str] = []
    for batch in batches:
        pixels = batch["image"] if "image" in batch else _side_by_side(batch)
        visible = {**batch, "image": _stretched(pixels)}
        if "label" in batch and batch["label"].ndim > 2:  # A class for each pixel.
            visible["segmentation"] = visible.pop("label")
        mask = batch.get("mask", np.ones(len(pixels)))
        for row in np.flatnonzero(mask)[: num_images - len(images)]:
            images.append(_picture(visible, row, class_names))
            if tokenizer and "tokens" in batch:
                captions.append(tokenizer.decode(batch["tokens"][row]))
            else:
                captions.append(_caption(visible.get("label"), row, class_names))
        if len(images) == num_images:
            break
    return images, captions


def _beside(original: np.ndarray, image: np.ndarray) -> np.ndarray:
    """Returns two images in one, uint8 `[h, widths, 3]`; the first gets the other's height."""
    height = image.shape[0]
    if original.shape[0] != height:
        width = max(1, round(original.shape[1] * height / original.shape[0]))
        original = np.asarray(Image.fromarray(original).resize((width, height)))
    return np.concatenate([original, image], axis=1)


def _picture(
    batch: dict[str, np.ndarray], row: int, class_names: Sequence[str] | None
) -> np.ndarray:
    """Returns an image as uint8 `[h, w, 3]`, with its segmentation and boxes drawn on it."""
    picture = drawing.rgb(batch["image"][row])
    if "segmentation" in batch:
        picture = drawing.with_segmentation(picture, batch["segmentation"][row])
    if "boxes" in batch:
        real = batch["box_label"][row] >= 0
        labels = batch["box_label"][row][real]
        boxes = batch["boxes"][row][real]
        if "content" in batch:
            boxes = boxes * np.tile(batch["content"][row], 2)
        names = [_name(number, class_names) for number in labels]
        picture = drawing.with_boxes(picture, boxes, labels, names)
    return picture


def _side_by_side(batch: dict[str, np.ndarray]) -> np.ndarray:
    """Returns the crops of each example in one image, `[b, h, widths, c]`, with 0 below them."""
    crops = [crop for x in batch.values() if x.ndim == 5 for crop in np.moveaxis(x, 1, 0)]
    height = max(crop.shape[1] for crop in crops)
    rows = [((0, 0), (0, height - crop.shape[1]), (0, 0), (0, 0)) for crop in crops]
    return np.concatenate([np.pad(*both) for both in zip(crops, rows, strict=True)], axis=2)


def _stretched(images: np.ndarray) -> np.ndarray:
    """Returns images as uint8 `[b, h, w, c]`.

    The range of float images is unknown here, so all images of the batch are scaled alike: in each
    channel the least value of the batch becomes 0, and the largest becomes 255.
    """
    if images.dtype == np.uint8:
        return images
    low, high = (extreme(images, axis=(0, 1, 2)) for extreme in (np.min, np.max))
    return ((images - low) * (255 / np.maximum(high - low, 1e-6))).round().astype(np.uint8)


def _caption(labels: np.ndarray | None, row: int, class_names: Sequence[str] | None) -> str:
    """Returns the class name, or the names and fractions of a mixed label, largest first."""
    if labels is None:
        return ""
    label = labels[row]
    numbers = np.flatnonzero(label > _MIN_FRACTION) if label.ndim else np.array([label])
    names = [_name(int(number), class_names) for number in numbers]
    if len(numbers) < 2 or (label[numbers] == 1).all():
        return ", ".join(names)
    order = np.argsort(-label[numbers], kind="stable")
    return ", ".join(f"{names[i]} {label[numbers[i]]:.0%}" for i in order)


def _name(number: int, class_names: Sequence[str] | None) -> str:
    return class_names[number] if class_names and 0 <= number < len(class_names) else str(number)
