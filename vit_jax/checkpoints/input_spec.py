"""The images that a checkpoint expects, and its classes, as the files beside its weights tell.

Weights alone do not say how images were resized and normalized for them. transformers keeps that in
`preprocessor_config.json`, timm in `config.json` under `pretrained_cfg`, open_clip in
`open_clip_config.json`, and a workdir of this package in the config of its run.
"""

import dataclasses
import math
import numbers
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from vit_jax.checkpoints import files, hub
from vit_jax.errors import UserError, first_line

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming")

# The numbers that Pillow has for them, which transformers writes.
_RESAMPLE = {
    0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming",
}  # fmt: skip
_TRANSFORMERS, _TIMM_OR_RUN = "preprocessor_config.json", "config.json"
_PROCESSOR = "processor_config.json"  # Of transformers 5, for models of images and texts.
OPEN_CLIP = "open_clip_config.json"
INDEPENDENT = "multi_label_classification"
"""The `problem_type` in transformers of a classifier of which several classes may hold at once."""
# Image processors of transformers that take a single number of `size` for both sides; for the
# others it is the shorter side.
_SQUARE = ("vit", "deit", "beit", "dpt", "siglip")

_READ_TEXTS = ("Model", "ForObjectDetection")
"""Endings of the names of classes of transformers that read texts, if the config tells of them."""

_LARGEST = 1e6
"""The largest mean or deviation of pixels; files of the hub have up to 255."""

_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclasses.dataclass(frozen=True)
class InputSpec:
    """The preparation of images for a model.

    An image is resized, its center is cut out, and each channel becomes `(x - mean) / std`.

    Attributes:
      mean, std: the statistics of each channel, or of all, for pixels from 0 to 255.
      size: (height, width) in pixels of what the model reads; None where the model tells it.
      crop: the share of the resized image's side that the cut keeps, in (0, 1].
      keeps_aspect: whether the shorter side is resized, instead of both sides to a fixed size.
      interpolation: one of `INTERPOLATIONS`, all with antialiasing except "nearest".
      rounds_to_even: whether an odd margin of the cut is halved to the nearest even number, as
        torchvision does, instead of rounding down.
    """

    mean: tuple[float, ...] = (127.5,)
    std: tuple[float, ...] = (127.5,)
    size: tuple[int, int] | None = None
    crop: float = 1.0
    keeps_aspect: bool = True
    interpolation: str = "bilinear"
    rounds_to_even: bool = False

    def describe(self) -> str:
        """Returns the spec in words, for a message."""
        fit = "shorter side" if self.keeps_aspect else "both sides"
        crop = f", then the middle {self.crop:.3g} of it cut out" if self.crop < 1 else ""
        statistics = f"mean {_listed(self.mean)}, std {_listed(self.std)}"
        return f"{statistics} of 0..255, {fit} resized ({self.interpolation}){crop}"

    def has_statistics(self, mean: Sequence[float], std: Sequence[float]) -> bool:
        """Returns whether these are the spec's own mean and std, up to rounding."""
        pairs = ((self.mean, mean), (self.std, std))
        return all(
            math.isclose(a, b, rel_tol=1e-3, abs_tol=0.05)
            for ours, theirs in pairs
            for a, b in zip(*_same_length(ours, theirs), strict=True)
        )


def read(path: epath.PathLike) -> InputSpec | None:
    """Returns what the files beside a checkpoint tell of its images; None where none does.

    Args:
      path: a checkpoint as `vit_jax.checkpoints.load` takes it.

    Raises:
      UserError: a file beside the checkpoint cannot be understood.
    """
    folder = folder_of(path)
    if folder is None:
        return None
    for name, parse in _PARSERS.items():
        told = folder / name
        found = _understood(parse, files.read_json(told), told) if told.exists() else None
        if found:
            return found
    for told, stored in _configs(folder):
        if "data_info" in stored:
            return _understood(_of_run, stored, told)
        if told.parent == folder and "pretrained_cfg" in stored:
            return _understood(_of_timm, stored["pretrained_cfg"], told)
    return None


def _configs(folder: epath.Path) -> Iterator[tuple[epath.Path, Mapping[str, Any]]]:
    """Yields the files `config.json` that may describe what is in a folder, and their content.

    The checkpoints of a run lie one or two folders below its config.
    """
    for above in (folder, folder.parent, folder.parent.parent):
        told = above / _TIMM_OR_RUN
        if told.exists():
            yield told, files.read_json(told)


def folder_of(path: epath.PathLike) -> epath.Path | None:
    """Returns the folder in which other files may describe a checkpoint; None if there is none."""
    name = os.fspath(hub.local_path(path, weights=False))
    if name.endswith(".npz") or ("://" in name and not name.startswith(files.STORES)):
        return None
    place = epath.Path(name).expanduser()
    return place if place.is_dir() else place.parent


def class_names(path: epath.PathLike) -> tuple[str, ...]:
    """Returns the names of a classifier's classes, as `config.json` of a checkpoint tells them.

    transformers has them under `id2label`, timm under `label_names`, a run of this package where it
    describes its data. The result is empty if there are none, or only numbers.
    """
    folder = folder_of(path)
    for told, stored in _configs(folder) if folder is not None else ():
        is_beside = told.parent == folder
        names = (stored.get("label_names") or stored.get("id2label")) if is_beside else ()
        names = names or _section(stored, "config", "task").get("class_names")
        names = names or _section(stored, "data_info").get("class_names")
        if names or is_beside:
            return _checked_names(names)
    return ()


def _checked_names(names: Any) -> tuple[str, ...]:
    if isinstance(names, Mapping):
        names = [names.get(str(number)) for number in range(len(names))]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return ()
    return () if all(re.fullmatch(r"LABEL_\d+", name) for name in names) else tuple(names)


def has_independent_classes(path: epath.PathLike) -> bool:
    """Returns whether several classes may hold at once, as `config.json` beside a checkpoint tells.

    transformers has it under `problem_type`, a run of this package under the loss of its task.
    """
    folder = folder_of(path)
    for told, stored in _configs(folder) if folder is not None else ():
        if told.parent == folder and stored.get("problem_type") == INDEPENDENT:
            return True
        task = _section(stored, "config", "task") if "data_info" in stored else {}
        if task:
            return task.get("loss") == "sigmoid" or task.get("name") == "multilabel"
    return False


def _section(stored: Any, *path: str) -> Mapping[str, Any]:
    """Returns a section of nested mappings, {} where there is none."""
    for name in path:
        stored = stored.get(name) if isinstance(stored, Mapping) else None
    return stored if isinstance(stored, Mapping) else {}


def is_image_text_model(path: epath.PathLike) -> bool:
    """Returns whether the files beside a checkpoint tell of two towers, which read texts."""
    folder = folder_of(path)
    if folder is None or not (folder / _TIMM_OR_RUN).exists():
        return folder is not None and (folder / OPEN_CLIP).exists()
    stored = files.read_json(folder / _TIMM_OR_RUN)
    kinds = stored.get("architectures") or ()
    return "text_config" in stored and any(str(kind).endswith(_READ_TEXTS) for kind in kinds)


def _understood(
    convert: Callable[[Mapping[str, Any]], InputSpec | None], stored: Any, place: epath.Path
) -> InputSpec | None:
    """Returns `convert(stored)`, with every mistake in it as one line that names the file."""
    try:
        if not isinstance(stored, Mapping):
            raise ValueError("it is no section")
        spec = convert(stored)
        if spec is None:
            return None
        if len(spec.mean) not in (1, len(spec.std)) and len(spec.std) != 1:
            raise ValueError("mean and std are of different lengths")
        if not all(abs(x) <= _LARGEST for x in (*spec.mean, *spec.std)):
            raise ValueError("mean and std are not those of pixels from 0 to 255")
        if not 0 < spec.crop <= 1:
            raise ValueError(f"a crop of {spec.crop:g} of the image")
        if spec.interpolation not in INTERPOLATIONS:
            raise ValueError(f"the interpolation {spec.interpolation!r}")
        return spec
    except (ValueError, TypeError, KeyError, AttributeError, ArithmeticError) as error:
        reason = first_line(error)
        raise UserError(f"{place} does not tell how to prepare images: {reason}") from error


def _of_transformers(stored: Mapping[str, Any]) -> InputSpec:
    """Reads the settings of an image processor of Hugging Face transformers."""
    rescale = stored.get("rescale_factor", 1 / 255) if stored.get("do_rescale", True) else 1.0
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    if stored.get("do_normalize", True):
        mean, std = _numbers(stored.get("image_mean", 0.5)), _numbers(stored.get("image_std", 0.5))
    kind = str(stored.get("image_processor_type") or stored.get("feature_extractor_type") or "vit")
    size = stored.get("size") if stored.get("do_resize", True) else None
    size, keeps_aspect = _resized(size, kind.lower().startswith(_SQUARE))
    crop = 1.0
    cut = _pair(stored["crop_size"]) if stored.get("do_center_crop") and size else None
    if cut and size:
        crop, size = min(cut) / min(size), cut
    elif stored.get("crop_pct") and size and min(size) < 384:  # ConvNeXt.
        crop, keeps_aspect = float(stored["crop_pct"]), True
    elif stored.get("crop_pct"):
        keeps_aspect = False
    return InputSpec(
        mean=tuple(m / rescale for m in mean),
        std=_positive(s / rescale for s in std),
        size=size,
        crop=crop,
        keeps_aspect=keeps_aspect,
        interpolation=_RESAMPLE[stored.get("resample", 2)],
    )


def _of_processor(stored: Mapping[str, Any]) -> InputSpec | None:
    """Reads a processor of images and texts, which may hold one of images."""
    images = stored.get("image_processor")
    return _of_transformers(images) if images else None


def _resized(size: Any, is_square: bool) -> tuple[tuple[int, int] | None, bool]:
    """Returns the size that images are resized to, and whether their aspect ratio is kept."""
    if size is None:
        return None, not is_square
    if isinstance(size, Mapping):
        # Detectors have both: images keep their whole content and any aspect.
        if {"shortest_edge", "longest_edge"} <= size.keys():
            return None, False
        if "shortest_edge" in size:
            return _pair(size["shortest_edge"]), True
        return _pair((size["height"], size["width"])), False
    return _pair(size), not is_square


def _of_timm(stored: Mapping[str, Any]) -> InputSpec:
    """Reads the `pretrained_cfg` of a timm model, as `timm.data.create_transform` does."""
    mode = stored.get("crop_mode", "center")
    if mode not in ("center", "squash"):
        raise ValueError(f"crop_mode {mode!r} is not known here")
    channels, height, width = stored["input_size"]
    del channels
    return InputSpec(
        mean=tuple(255 * m for m in _numbers(stored.get("mean", (0.485, 0.456, 0.406)))),
        std=_positive(255 * s for s in _numbers(stored.get("std", (0.229, 0.224, 0.225)))),
        size=_pair((height, width)),
        crop=float(stored.get("crop_pct") or 0.875),
        keeps_aspect=mode == "center",
        interpolation=stored.get("interpolation", "bicubic"),
        rounds_to_even=True,
    )


def _of_open_clip(stored: Mapping[str, Any]) -> InputSpec:
    """Reads the `preprocess_cfg` of open_clip, whose defaults are those of OpenAI's CLIP."""
    told = stored.get("preprocess_cfg", {})
    mode = told.get("resize_mode", "shortest")
    if mode not in ("shortest", "squash"):
        raise ValueError(f"resize_mode {mode!r} is not known here")
    return InputSpec(
        mean=tuple(255 * m for m in _numbers(told.get("mean", _CLIP_MEAN))),
        std=_positive(255 * s for s in _numbers(told.get("std", _CLIP_STD))),
        size=_pair(told.get("size", stored["model_cfg"]["vision_cfg"].get("image_size", 224))),
        keeps_aspect=mode == "shortest",
        interpolation=told.get("interpolation", "bicubic"),
        rounds_to_even=True,
    )


def _of_run(stored: Mapping[str, Any]) -> InputSpec:
    """Reads the statistics of a run's task; sizes and crops are in its preprocessing."""
    task = stored["config"]["task"]
    default = InputSpec()
    return InputSpec(
        mean=_numbers(task.get("mean", default.mean)),
        std=_positive(_numbers(task.get("std", default.std))),
    )


def _numbers(value: Any) -> tuple[float, ...]:
    values = value if isinstance(value, list | tuple) else (value,)
    for one in values:
        if isinstance(one, bool) or not isinstance(one, numbers.Real) or not math.isfinite(one):
            raise ValueError(f"{one!r} is no number")
    if not values:
        raise ValueError("an empty list of numbers")
    return tuple(float(one) for one in values)


def _positive(values: Iterable[float]) -> tuple[float, ...]:
    found = tuple(values)
    if min(found) <= 0:
        raise ValueError("std is not positive")
    return found


def _pair(size: Any) -> tuple[int, int]:
    """Returns a size, a side or (height, width), as (height, width)."""
    if isinstance(size, Mapping):
        size = size["height"], size["width"]
    height, width = size if isinstance(size, list | tuple) else (size, size)
    for side in (height, width):
        if isinstance(side, bool) or not isinstance(side, int) or not 0 < side < 1 << 16:
            raise ValueError(f"{side!r} is no side in pixels")
    return height, width


def _same_length(a: Sequence[float], b: Sequence[float]) -> tuple[Sequence[float], Sequence[float]]:
    """Returns both, one value repeated for each channel of the other."""
    return (
        tuple(a) * (len(b) if len(a) == 1 else 1),
        tuple(b) * (len(a) if len(b) == 1 else 1),
    )


def _listed(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.5g}" for value in values)


_PARSERS = {
    _TRANSFORMERS: _of_transformers,
    _PROCESSOR: _of_processor,
    OPEN_CLIP: _of_open_clip,
}
"""The reader of each file that may lie beside the weights, in the order of their precedence."""
