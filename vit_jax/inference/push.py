"""Uploads a run's model to the Hugging Face hub: weights, labels, preprocessing and a card."""

import json
import os
import re
import shlex
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vit_jax import tasks
from vit_jax.checkpoints import files, hub, input_spec
from vit_jax.checkpoints.formats import timm
from vit_jax.checkpoints.store import Store
from vit_jax.errors import UserError
from vit_jax.inference import convert
from vit_jax.tracking import read_metrics
from vit_jax.tracking.console import format_duration
from vit_jax.tracking.metrics import from_json, meaning
from vit_jax.tracking.plain_text import code_span
from vit_jax.training.evaluate import step_of
from vit_jax.training.restore import last_evaluation
from vit_jax.training.workdir import Workdir

CONFIG = "vit_jax_config.json"

# A path from the root, the home or here, or an address of a store; not the `/` of a name.
_PLACE = re.compile(r"(?<![\w.~/:-])(?!hf://)(?:[a-z][a-z0-9]*:/|~|\.{1,2})?/[^\s,:;]*")

LAYOUTS = (("hf", ""), ("timm", "model.safetensors"), ("npz", "model.npz"))
"""Formats in the order in which they are tried, and the file that each writes; "" for a folder."""

_CARD = """\
---
library_name: {library}
pipeline_tag: {task}
tags: [vision-transformer, vit_jax]
{origin}---

# {title}

A model {model}, trained with vit_jax{commit}.

{use}
{code}
## Last evaluation until step {step}

{metrics}

## Data and preprocessing

Training read {examples} of {data} (source {source}, split {split}). In evaluation, images
were prepared by

{eval_pp}

and then {spec}.

## How it was made

{command}

{machine}{start}Packages: {packages}. The config is in `{config}`.
"""


def push(path: str, address: str, *, private: bool = False, step: int | str | None = None) -> str:
    """Uploads a run's model and returns a line about it.

    The layout is that of transformers if it has a place for the model, else a file with timm's
    names, else an `.npz`. Paths on this machine or on object stores are reduced to their last part.

    Args:
      path: the workdir.
      address: `hf://USER/REPO`, or `hf://USER/REPO@BRANCH`; what is not there is made.
      private: whether a new repository is private.
      step: the step whose checkpoint is uploaded, or "best"; None is the newest.

    Raises:
      UserError: there is no run, no format has a place for its model, or the hub refuses.
    """
    workdir = Workdir.existing(path)
    at = step_of(Store(workdir.checkpoints), workdir.read_config(), step)
    source = str(workdir.checkpoints / str(at))
    with tempfile.TemporaryDirectory(prefix="vit_jax_") as scratch:
        folder = Path(scratch) / "repository"
        shape = _image_shape(workdir)
        layout, name, said = _write_weights(source, folder, (shape[0], shape[1]))
        loaded = hub.with_file(address, name) if name else address
        record = _without_paths(workdir.read_record())
        created = timm.created(folder / name) if layout == "timm" else {}
        if layout == "hf":
            _describe_for_transformers(workdir, record, folder, shape)
        else:
            _describe(workdir, record, folder, _for_timm(workdir, created, shape))
        library, code = _client(said, folder / name, address, created)
        card = _card(workdir, record, library, code, loaded=loaded, step=at)
        (folder / "README.md").write_text(card, "utf-8", "backslashreplace")
        commit = hub.upload(folder, address, private=private)
    return f"{path} is at {address}, commit {commit[:10]}; read it back as {loaded}"


def _image_shape(workdir: Workdir) -> tuple[int, ...]:
    """Returns the shape of the images that the run's model reads."""
    config = workdir.read_config()
    sections = config.task.to_dict(), config.model.to_dict()
    return tasks.build(*sections, workdir.read_info()).image_spec.shape


def _write_weights(path: str, folder: Path, size: tuple[int, int]) -> tuple[str, str, str]:
    """Writes the model in the first layout that has a place for it.

    Returns the layout, the name of the file, and what `convert.run` says.
    """
    reasons = []
    for layout, name in LAYOUTS:
        try:
            said = convert.run(path, str(folder / name), layout, image_size=size)
            return layout, name, said
        except UserError as error:
            reasons.append(str(error))
    raise UserError(f"{path} cannot be written for the hub: {'; '.join(reasons)}")


def _without_paths(value: Any) -> Any:
    """Returns a record in which paths and addresses are reduced to their last part."""
    if isinstance(value, Mapping):
        return {key: _without_paths(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_without_paths(each) for each in value]
    if isinstance(value, str) and "|" not in value:  # Preprocessing has no paths.
        return _PLACE.sub(lambda found: found[0].rstrip("/").rpartition("/")[2], value)
    return value


def _describe(
    workdir: Workdir, record: Mapping[str, Any], folder: Path, more: Mapping[str, Any]
) -> None:
    """Writes config.json: the run's config and data, its classes' names, and the keys of `more`."""
    # `predict` reads mean, std and names from it, as from the config of a run.
    told = {key: record[key] for key in ("config", "data_info")}
    names = workdir.read_class_names()
    _write_json(folder / "config.json", {**told, "label_names": names, **more})


def _for_timm(
    workdir: Workdir, created: Mapping[str, Any], shape: tuple[int, ...]
) -> dict[str, Any]:
    """Returns the keys from which `timm.create_model` makes the model and its preprocessing.

    created: the model's, from `timm.created`; if it is {}, timm cannot make the model.
    """
    if not created:
        return {}
    height, width, channels = shape
    mean, std = _statistics(workdir, channels)
    pretrained = {
        "input_size": [channels, height, width],
        "fixed_input_size": True,
        "mean": mean,
        "std": std,
        "interpolation": "bilinear",
        "crop_pct": 1.0,
        "crop_mode": "squash",
        "num_classes": created["model_args"]["num_classes"],
        "classifier": "head",
    }
    return {**created, "pretrained_cfg": pretrained}


def _statistics(workdir: Workdir, channels: int) -> tuple[list[float], list[float]]:
    """Returns the mean and the standard deviation of each channel, for pixels from 0 to 1."""
    spec = input_spec.read(str(workdir.path))
    assert spec is not None
    mean, std = (list(each) * (channels // len(each)) for each in (spec.mean, spec.std))
    return [m / 255 for m in mean], [s / 255 for s in std]


def _describe_for_transformers(
    workdir: Workdir, record: Mapping[str, Any], folder: Path, shape: tuple[int, ...]
) -> None:
    """Adds the run's config, the names of its classes, and how its images are prepared."""
    names = workdir.read_class_names()
    _write_json(folder / CONFIG, record["config"])
    config = files.read_json(folder / "config.json")
    if len(names) == len(config.get("id2label", ())) > 0:
        config["id2label"] = {str(number): name for number, name in enumerate(names)}
        config["label2id"] = {name: number for number, name in enumerate(names)}
    if input_spec.has_independent_classes(str(workdir.path)):
        config["problem_type"] = input_spec.INDEPENDENT
    _write_json(folder / "config.json", config)
    height, width, channels = shape
    mean, std = _statistics(workdir, channels)
    processor = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": height, "width": width},
        "resample": 2,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": mean,
        "image_std": std,
    }
    _write_json(folder / "preprocessor_config.json", processor)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _client(said: str, place: Path, address: str, created: Mapping[str, Any]) -> tuple[str, str]:
    """Returns the library whose models the repository holds, and the statements that load one.

    The library is `vit_jax` if the other library cannot load the model from the hub by its name
    alone. The statements are "" if no other library loads it.

    Args:
      said: what `convert.run` returned, which ends with the call that loads the result.
      place: the file or folder that the call names.
      address: the repository that it is uploaded to.
      created: the model's keys from `timm.created`.
    """
    library, _, call = said.splitlines()[-1].partition(": ")
    if not call.startswith("model = "):
        return "vit_jax", ""
    repository, revision = hub.repository_of(address), hub.revision_of(address)
    if created:
        name = f"hf-hub:{repository}@{revision}" if revision else f"hf-hub:{repository}"
        return library, f"import timm\n\nmodel = timm.create_model({name!r}, pretrained=True)"
    version = f", revision={revision!r}" if revision else ""
    file = "" if place.is_dir() else f" + {'/' + place.name!r}"
    lines = [
        *(["import functools", ""] if "functools." in call else []),
        f"import {library}",
        "from huggingface_hub import snapshot_download",
        "",
        f"folder = snapshot_download({repository!r}{version})",
        call.replace(repr(os.fspath(place)), f"folder{file}"),
    ]
    return "vit_jax" if file else library, "\n".join(lines)


def _card(
    workdir: Workdir,
    record: Mapping[str, Any],
    library: str,
    code: str,
    *,
    loaded: str,
    step: int,
) -> str:
    config, found = record["config"], last_evaluation(workdir, step)
    data, told = config["data"], input_spec.read(str(workdir.path))
    assert told is not None
    repo, at = _started_from(record)
    examples = record["data_info"].get("num_examples")
    classifies = bool(record["data_info"]["num_classes"])
    use = f"vit-jax {'predict' if classifies else 'features'} --checkpoint={loaded} photo.jpg"
    return _CARD.format(
        library=library,
        task="image-classification" if classifies else "image-feature-extraction",
        title=loaded.removeprefix(hub.PREFIX),
        model=code_span(config["model"]["name"]),
        commit=f" at commit {record['commit']}" if record["commit"] else "",
        step=step,
        use=_fenced(use, "sh"),
        code=f"\n{_fenced(code, 'python')}\n" if code else "",
        metrics=_table(found, record),
        examples=f"{examples:,} examples" if examples else "the examples",
        data=code_span(data["name"]),
        source=code_span(data["source"]),
        split=code_span(data["split"]),
        eval_pp=_fenced(data["eval_pp"] or data["pp"]),
        spec=told.describe(),
        command=_command(record["command"]),
        machine=_machine(workdir, record["devices"], step),
        origin=f"base_model: {repo}\n" if repo else "",
        start=f"It started from `{repo}` at commit {at}.\n\n" if repo else "",
        packages=", ".join(f"{name} {version}" for name, version in record["packages"].items()),
        config=CONFIG if library == "transformers" else "config.json",
    )


def _started_from(record: Mapping[str, Any]) -> tuple[str, str]:
    """Returns the repository of the hub that a run started from, and its commit, or two ""."""
    start = record["config"].get("init", {}).get("checkpoint", "")
    commits = record["hub_commits"]
    address = start if start in commits else hub.address_of(start)
    return (hub.repository_of(address), commits[address]) if address in commits else ("", "")


def _machine(workdir: Workdir, devices: Mapping[str, Any], step: int) -> str:
    """Returns the devices and the time of a run, as far as its workdir tells them."""
    told = []
    if devices:
        number = f"{devices['count']:,} device{'s' * (devices['count'] != 1)}"
        told.append(f"The run, when it last started, had {number} ({code_span(devices['kind'])}).")
    rows = [row for row in read_metrics(workdir.path) if row["step"] <= step]
    seconds = [row["train/run_seconds"] for row in rows if "train/run_seconds" in row]
    if seconds:
        told.append(
            f"It took {format_duration(seconds[-1])} until step {step}, which includes its start,"
            " compiling, evaluations and saves."
        )
    return f"{' '.join(told)}\n\n" if told else ""


def _command(words: Sequence[str]) -> str:
    """Returns the command of the run; one that was begun in Python has none."""
    # Earlier versions recorded the arguments of any Python process, such as those of a notebook.
    if "train" not in words[:4]:
        return "The training was begun in Python."
    return _fenced(shlex.join(words), "sh")


def _fenced(text: str, language: str = "") -> str:
    """Returns a block of code that no text can end."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def _table(found: Mapping[str, Any], record: Mapping[str, Any]) -> str:
    if not found:
        return "The run was not evaluated."
    info = from_json(record["metrics"])
    rows = [
        f"| {code_span(name).replace('|', '/')} | {meaning(name, info).text(value)} |"
        for name, value in found.items()
    ]
    return "\n".join(["| metric | value |", "|---|---|", *rows])
