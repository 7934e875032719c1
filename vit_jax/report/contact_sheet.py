"""A picture of what the model sees: images of a batch in a grid, each with its class name.

Boxes and segmentations are drawn on the images they belong to.
"""

from collections.abc import Iterable, Sequence
from os import PathLike

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vit_jax.data.tokenizer import Tokenizer
from vit_jax.errors import UserError
from vit_jax.report import drawing

_MIN_TILE = 112
_GAP = 8
_BACKGROUND = (255, 255, 255)
_INK = (40, 40, 40)
_MIN_SHARE = 0.1
"""Of a class in a soft label that is named; smoothing gives every class a little."""


def contact_sheet(
    batches: Iterable[dict[str, np.ndarray]],
    class_names: Sequence[str] | None,
    path: str | PathLike,
    *,
    num_images: int = 64,
    columns: int = 8,
    tokenizer: Tokenizer | None = None,
) -> int:
    """Draws the first images of `batches` and writes them as PNG.

    Args:
        batches: `image` uint8 or float `[b, h, w, 1 or 3]`; `label` integers `[b]` or vectors
            `[b, classes]`; `segmentation`, `boxes` and `box_label` where there are any; rows whose
            `mask` is 0 are left out. No more is taken than needed.
        class_names: names for the labels; None shows the numbers.
        path: the file to write.
        num_images: how many to draw; fewer if the batches end before.
        columns: images in a row.
        tokenizer: of `tokens` `[b, length]`, whose texts are then the captions.

    Returns:
        The number of images drawn.

    Raises:
        UserError: the file cannot be written.
    """
    images, captions = _collect(batches, class_names, num_images, tokenizer)
    if not images:
        raise ValueError("no images to draw")
    font = drawing.font(13)
    height, width = images[0].shape[:2]
    # Whole multiples keep the pixels of tiny images square and sharp.
    zoom = max(1, -(-_MIN_TILE // max(height, width)))
    tile_width, tile_height = width * zoom, height * zoom
    step_x, step_y = tile_width + _GAP, tile_height + font.size + 2 * _GAP
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * step_x + _GAP, rows * step_y + _GAP), _BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    for number, (pixels, caption) in enumerate(zip(images, captions, strict=True)):
        x = _GAP + number % columns * step_x
        y = _GAP + number // columns * step_y
        tile = Image.fromarray(pixels).resize((tile_width, tile_height), Image.Resampling.NEAREST)
        sheet.paste(tile, (x, y))
        draw.text((x, y + tile_height + 3), _fit(caption, font, tile_width), _INK, font)
    try:
        sheet.save(path, "PNG")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error}") from error
    return len(images)


def _collect(
    batches: Iterable[dict[str, np.ndarray]],
    class_names: Sequence[str] | None,
    num_images: int,
    tokenizer: Tokenizer | None,
) -> tuple[list[np.ndarray], list[str]]:
    """RGB pixels `[h, w, 3]` and captions of the first real rows."""
    images, captions = [], []
    for batch in batches:
        visible = {**batch, "image": _stretched(batch["image"])}
        mask = batch.get("mask", np.ones(len(batch["image"])))
        for row in np.flatnonzero(mask)[: num_images - len(images)]:
            images.append(_picture(visible, row, class_names))
            told = _caption(batch.get("label"), row, class_names)
            if tokenizer and "tokens" in batch:
                told = tokenizer.decode(batch["tokens"][row])
            captions.append(told)
        if len(images) == num_images:
            break
    return images, captions


def _picture(
    batch: dict[str, np.ndarray], row: int, class_names: Sequence[str] | None
) -> np.ndarray:
    """One image as uint8 `[h, w, 3]`, with what is known of its pixels and objects drawn on it."""
    picture = drawing.rgb(batch["image"][row])
    if "segmentation" in batch:
        picture = drawing.with_segmentation(picture, batch["segmentation"][row])
    if "boxes" in batch:
        real = batch["box_label"][row] >= 0
        labels = batch["box_label"][row][real]
        boxes = batch["boxes"][row][real]
        if "content" in batch:
            boxes = boxes * np.tile(batch["content"][row], 2)
        names = [class_names[n] if class_names else str(n) for n in labels]
        picture = drawing.with_boxes(picture, boxes, labels, names)
    return picture


def _stretched(images: np.ndarray) -> np.ndarray:
    """uint8 `[b, h, w, c]`.

    Float images, whose range and normalisation are unknown here, are stretched together: in each
    channel the darkest value of the batch becomes black, the brightest white.
    """
    if images.dtype == np.uint8:
        return images
    low, high = (extreme(images, axis=(0, 1, 2)) for extreme in (np.min, np.max))
    return ((images - low) * (255 / np.maximum(high - low, 1e-6))).round().astype(np.uint8)


def _caption(labels: np.ndarray | None, row: int, class_names: Sequence[str] | None) -> str:
    """Class names; with their shares where the label is a mixture, largest first."""
    if labels is None:
        return ""
    label = labels[row]
    numbers = np.flatnonzero(label > _MIN_SHARE) if label.ndim else np.array([label])
    names = [class_names[n] if class_names else str(n) for n in numbers]
    if len(numbers) < 2 or (label[numbers] == 1).all():
        return ", ".join(names)
    order = np.argsort(-label[numbers], kind="stable")
    return ", ".join(f"{names[i]} {label[numbers[i]]:.0%}" for i in order)


def _fit(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """`text` cut to `width` pixels, with an ellipsis where something is missing."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"
