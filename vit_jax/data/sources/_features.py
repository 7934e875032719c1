"""The features of Hugging Face datasets: what a column of a Parquet file holds, and class names."""

import contextlib
import json
import logging
import os
from typing import Any

from vit_jax.data import files

KEY = b"huggingface"
"""The key of the features in the metadata of a Parquet file."""

logger = logging.getLogger(__name__)


def read(path: str, stored: bytes) -> dict[str, Any]:
    """Returns the features of a Parquet file by column; {} if there are none.

    Without those in the file, they are those in the dataset's files beside it. These may describe
    several configurations. Features that differ between them are not used, with a warning.

    Args:
      stored: the features in the metadata of the file.
    """
    if found := parse(stored):
        return found
    folder = os.path.dirname(path)
    for place in (folder, os.path.dirname(folder)):
        for name in ("dataset_info.json", "dataset_infos.json"):
            file = os.path.join(place, name)
            if not files.is_file(file):
                continue
            several = _parse_all(files.read_text(file))
            if any(one != several[0] for one in several):
                logger.warning(
                    "%s describes %d configurations with different features, so none of them names"
                    " the classes; config.data.args.class_names does",
                    files.shown(file), len(several),
                )  # fmt: skip
                return {}
            if several:
                return several[0]
    return {}


def parse(stored: bytes) -> dict[str, Any]:
    """Returns the features in the metadata of a Parquet file; {} if there are none."""
    return next(iter(_parse_all(stored.decode(errors="replace"))), {})


def _parse_all(text: str) -> list[dict[str, Any]]:
    """Returns the features of each configuration, in any of the forms in which they are stored."""
    stored: Any = None
    with contextlib.suppress(ValueError, RecursionError):
        stored = json.loads(text)
    if not isinstance(stored, dict):
        return []
    for forms in ([stored], [stored.get("info")], stored.values()):
        features = [one.get("features") for one in forms if isinstance(one, dict)]
        found = [one for one in features if isinstance(one, dict)]
        if found:
            return found
    return []


def label_names(feature: Any) -> tuple[str, ...]:
    """Returns the class names of a feature, or of the entries of a list."""
    if isinstance(feature, list) and len(feature) == 1:
        return label_names(feature[0])
    if not isinstance(feature, dict):
        return ()
    names = feature.get("names")
    if feature.get("_type") == "ClassLabel" and isinstance(names, list):
        return tuple(map(str, names))
    return label_names(feature.get("feature"))
