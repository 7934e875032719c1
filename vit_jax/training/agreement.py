"""The comparison of what the processes of one run have read, before they compute together.

Processes with other configs, other files or other checkpoints would wait for each other for ever,
or train on batches that no single process would make.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from vit_jax import config as config_lib
from vit_jax import data
from vit_jax.errors import UserError, quoted
from vit_jax.training.run import Run

_OWN = ("data.name", "data.dir", "data.threads", "data.prefetch", "data.timeout")
"""Keys that a process may have for itself; of places of data, what they hold is compared."""

_MOST_NAMED = 4096
_MOST_SHOWN = 3


def check(run: Run, sources: Mapping[str, data.Source], checkpoint: object) -> None:
    """Raises a `UserError` in every process if one of them has something else than process 0.

    A single process returns at once.

    Args:
      sources: the sources of evaluation that this process opened, by their sections of the config,
        such as `eval.sets.val`.
      checkpoint: what it is about to read, such as the step of a checkpoint.
    """
    if jax.process_count() == 1:
        return
    assert not isinstance(run.source, data.Expected)
    facts = dict(_of_config(run.config)) | dict(_of_data(run.config.data.name, run.source, "data"))
    for section, source in sources.items():
        name, evaluation = section.removeprefix("eval.sets."), run.config.eval
        told = evaluation.probes if section == "eval.probes" else evaluation.sets[name]
        facts |= dict(_of_data(told.get("name", run.config.data.name), source, section))
    facts |= {
        "the checkpoint to start from": str(checkpoint),
        "the version of JAX": jax.__version__,
    }
    found = differences(_gathered(facts))
    if found:
        raise UserError(
            f"the processes of this run have read different things: {'; '.join(found)}. Start all"
            " of them with the same config, data and workdir"
        )


def differences(facts: Sequence[Mapping[str, str]]) -> list[str]:
    """Returns a line about each of the first facts that differ between processes.

    facts: what each process has read, by name.
    """
    lines = []
    for name in dict.fromkeys(name for of_one in facts for name in of_one):
        values = [of_one.get(name, "nothing") for of_one in facts]
        other = next((i for i, value in enumerate(values) if value != values[0]), None)
        if other is not None:
            lines.append(
                f"{name} is {quoted(values[0])[1:-1]} in process 0 and"
                f" {quoted(values[other])[1:-1]} in process {other}"
            )
    more = [f"and {len(lines) - _MOST_SHOWN} more"] if len(lines) > _MOST_SHOWN else []
    return lines[:_MOST_SHOWN] + more


def _of_config(config: ConfigDict) -> Iterator[tuple[str, str]]:
    for path, value in config_lib.flatten(config.to_dict()):
        of_evaluation = path.startswith(("eval.sets.", "eval.probes."))
        is_place = of_evaluation and path.endswith((".name", ".dir"))
        if path not in (*_OWN, "compilation_cache") and not is_place:
            yield f"config.{path}", repr(value)


def _of_data(name: str, source: data.Source, key: str) -> Iterator[tuple[str, str]]:
    """Yields what tells one source from another: examples, classes, and a sample of the names."""
    yield f"the number of examples of config.{key}", str(len(source))
    yield f"the classes of config.{key}", _with_digest(source.class_names or source.num_classes)
    yield (
        f"the number of examples of each class of config.{key}",
        _with_digest(data.class_counts(source)),
    )
    numbers = np.unique(np.linspace(0, len(source) - 1, _MOST_NAMED).astype(int))
    # The same files may lie in other places.
    names = [source.describe(int(number)).replace(name, "") for number in numbers]
    yield f"the list of examples of config.{key}", _with_digest(names)


def _with_digest(values: object) -> str:
    """Returns values in few letters that differ where the values do."""
    text = repr(values)
    if len(text) < 100:
        return text
    return f"{text[:60]}... ({hashlib.sha256(text.encode(errors='replace')).hexdigest()[:8]})"


def _gathered(facts: Mapping[str, str]) -> list[dict[str, str]]:
    """Returns the facts of all processes, by their numbers."""
    own = np.frombuffer(json.dumps(facts).encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.array([len(own)], np.int32)).reshape(-1)
    padded = np.zeros(int(lengths.max()), np.uint8)
    padded[: len(own)] = own
    everyones = np.asarray(multihost_utils.process_allgather(padded)).reshape(len(lengths), -1)
    return [
        json.loads(row[:length].tobytes()) for row, length in zip(everyones, lengths, strict=True)
    ]
