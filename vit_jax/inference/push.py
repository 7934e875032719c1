"""Uploads a run's model to the Hugging Face hub: weights, labels, preprocessing and a card."""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vit_jax.checkpoints import files, hub, input_spec
from vit_jax.errors import UserError
from vit_jax.inference import convert
from vit_jax.tracking.metrics import from_json, meaning
from vit_jax.training.restore import last_evaluation
from vit_jax.training.workdir import Workdir

LAYOUTS = (("hf", ""), ("timm", "model.safetensors"), ("npz", "model.npz"))
"""Formats in the order in which they are tried, and the file that each writes; "" for a folder."""

_CARD = """\
---
library_name: {library}
pipeline_tag: image-classification
tags: [vision-transformer, vit_jax]
---

# {title}

A `{model}`, trained with vit_jax{commit}.

```sh
vit-jax predict --checkpoint={address} photo.jpg
```

## Evaluation

{metrics}

## Data and preprocessing

Training read {examples} of `{data}` (source `{source}`, split `{split}`). In evaluation, images
were prepared with `{eval_pp}`; {spec}.

## How it was made

```sh
{command}
```

Packages: {packages}. The whole config is in `vit_jax_config.json`.
"""


def push(path: str, address: str, *, private: bool = False) -> str:
    """Uploads a run's model and returns a line about it.

    The layout is that of transformers if it has a place for the model, else a file that timm loads,
    else an `.npz`.

    Args:
      path: the workdir.
      address: `hf://USER/REPO`; the repository is made if there is none.
      private: whether a new repository is private.

    Raises:
      UserError: there is no run, no format has a place for its model, or the hub refuses.
    """
    workdir = Workdir.existing(path)
    with tempfile.TemporaryDirectory(prefix="vit_jax_") as scratch:
        folder, layout = _write_weights(path, Path(scratch) / "repository")
        _describe(workdir, folder, layout)
        suffix = dict(LAYOUTS)[layout]
        loaded = f"{address}/{suffix}" if suffix else address
        (folder / "README.md").write_text(_card(workdir, layout, loaded), encoding="utf-8")
        hub.upload(folder, address, private=private)
    return f"{path} is at {address}; read it back as {loaded}"


def _write_weights(path: str, folder: Path) -> tuple[Path, str]:
    """Writes the model in the first layout that has a place for it, and returns the layout."""
    reasons = []
    for layout, name in LAYOUTS:
        try:
            convert.run(path, str(folder / name if name else folder), layout)
            return folder, layout
        except UserError as error:
            reasons.append(str(error))
    raise UserError(f"{path} cannot be written for the hub: {'; '.join(reasons)}")


def _describe(workdir: Workdir, folder: Path, layout: str) -> None:
    """Adds the run's config, the names of its classes, and how its images are prepared."""
    stored = workdir.read_record()
    (folder / "vit_jax_config.json").write_text(json.dumps(stored["config"], indent=2) + "\n")
    if layout != "hf":
        return
    config = files.read_json(folder / "config.json")
    names = workdir.read_class_names()
    if len(names) == len(config.get("id2label", ())) > 0:
        config["id2label"] = {str(number): name for number, name in enumerate(names)}
        config["label2id"] = {name: number for number, name in enumerate(names)}
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    height, width, _ = stored["data_info"]["spec"]["image"]["shape"]
    told = input_spec.read(str(workdir.path))
    processor = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": height, "width": width},
        "resample": 2,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [m / 255 for m in told.mean],
        "image_std": [s / 255 for s in told.std],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n")


def _card(workdir: Workdir, layout: str, loaded: str) -> str:
    stored = workdir.read_record()
    config, found = stored["config"], last_evaluation(workdir)
    data, told = config["data"], input_spec.read(str(workdir.path))
    examples = stored["data_info"].get("num_examples")
    return _CARD.format(
        library={"hf": "transformers", "timm": "timm"}.get(layout, "vit_jax"),
        title=loaded.removeprefix(hub.PREFIX),
        model=config["model"]["name"],
        commit=f" at commit {stored['commit']}" if stored.get("commit") else "",
        address=loaded,
        metrics=_table(found, workdir),
        examples=f"{examples:,} examples" if examples else "the examples",
        data=data["name"],
        source=data["source"],
        split=data["split"],
        eval_pp=data["eval_pp"] or "the training preprocessing",
        spec=told.describe(),
        command=" ".join(stored["command"]),
        packages=", ".join(f"{name} {version}" for name, version in stored["packages"].items()),
    )


def _table(found: Mapping[str, Any], workdir: Workdir) -> str:
    if not found:
        return "The run was not evaluated."
    info = from_json(workdir.read_record()["metrics"])
    rows = [f"| {name} | {meaning(name, info).text(value)} |" for name, value in found.items()]
    return "\n".join(["| metric | value |", "|---|---|", *rows])
