"""Reproduces a recipe on TPU slices and fills its row of the results table: for `reproduce.sh`.

The stages are: prepare the datasets, plan, create the slices, train, delete the slices, evaluate,
write. Each is a list of commands of `vit-jax`, and is skipped when its outcome exists. Flags that
are not known here go to `tpu create`, and `--config.KEY=VALUE` to the run.
"""

import argparse
import dataclasses
import datetime
import functools
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from vit_jax import config as config_lib
from vit_jax.errors import UserError, program
from vit_jax.launch import slices
from vit_jax.storage import write_atomically
from vit_jax.tracking import WITHIN_TRAIN, read_metrics
from vit_jax.tracking.rows import encode
from vit_jax.training.workdir import Workdir

ROOT = Path(__file__).parents[1]
TITLES = {"val": "", "real": "ReaL ", "v2": "V2 "}

Command = list[str]


@dataclasses.dataclass(frozen=True)
class Job:
    """One reproduction: the recipe and where everything lies.

    Attributes:
      recipe: the name of a config and its arguments, such as `vit_s16_i1k:300`.
      sets: further test sets, as the recipes' argument `others` takes them.
      pod: the name of the slices.
      bucket: a folder of an object store, or of a disk that all hosts share.
      create: flags for `tpu create`. overrides: `--config.KEY=VALUE` for the run.
      price: dollars of a chip for an hour; None if it was not given.
      root: the folder of `configs`, `results`, `docs` and `runs`.
    """

    recipe: str
    type: str
    bucket: str
    sets: str = "real+v2"
    pod: str = ""
    num_slices: int = 1
    create: Sequence[str] = ()
    overrides: Sequence[str] = ()
    data_dir: str = ""
    manual_dir: str = ""
    price: float | None = None
    root: Path = ROOT

    @property
    def name(self) -> str:
        """Returns the recipe as a name of files and slices."""
        return re.sub(r"[^A-Za-z0-9]+", "_", self.recipe).strip("_")

    @property
    def config(self) -> str:
        """Returns the config with the further test sets."""
        name, _, arguments = self.recipe.partition(":")
        others = f"others={self.sets}" if self.sets else ""
        arguments = ",".join(filter(None, (arguments, others)))
        return f"configs/{name}.py" + (f":{arguments}" if arguments else "")

    @property
    def slices(self) -> str:
        return self.pod or self.name.lower().replace("_", "-")

    @property
    def tfds(self) -> str:
        return f"{self.bucket}/tfds"

    @property
    def workdir(self) -> str:
        return f"{self.bucket}/{self.name}"

    @property
    def folder(self) -> Path:
        """Returns the folder of what is not worth keeping once the results are written."""
        return self.root / "runs" / "reproduce" / self.name

    @property
    def run_flags(self) -> Command:
        return [f"--config={self.config}", f"--config.data.dir={self.tfds}", *self.overrides]

    @functools.cached_property
    def loaded(self) -> Any:
        """Returns the config of the run."""
        given = (flag.removeprefix("--config.").partition("=") for flag in self.overrides)
        name, _, arguments = self.config.partition(":")
        spec = f"{self.root / name}:{arguments}"
        return config_lib.load(spec, {key: value for key, _, value in given})

    def datasets(self) -> list[str]:
        """Returns the names of all TFDS datasets that the run reads."""
        data = self.loaded.data
        found = [data.name] if data.source == "tfds" else []
        for one in self.loaded.eval.sets.values():
            if one.get("source", data.source) == "tfds":
                found.append(one.get("name", data.name))
        return list(dict.fromkeys(found))


@dataclasses.dataclass(frozen=True)
class Stage:
    """A step of the way, and the question whether its outcome exists."""

    name: str
    commands: Sequence[Command]
    is_done: Callable[[], bool]


class Notes:
    """Remembers the commands of finished stages: an outcome of other commands does not count."""

    def __init__(self, folder: Path):
        self._path = folder / "stages.json"

    def has(self, stage: str, commands: Sequence[Command]) -> bool:
        return self._read().get(stage) == list(commands)

    def add(self, stage: str, commands: Sequence[Command]) -> None:
        text = json.dumps({**self._read(), stage: list(commands)}, indent=1) + "\n"
        write_atomically(self._path, text.encode())

    def _read(self) -> dict[str, Any]:
        return json.loads(self._path.read_text()) if self._path.exists() else {}


def stages(job: Job, notes: Notes, *, dry_run: bool = False) -> Iterator[Stage]:
    """Yields all stages but the last, which writes the results; what is found later counts.

    dry_run: looks at no bucket, so that the last stage evaluates on all test sets.
    """
    done_file = epath.Path(job.workdir) / "DONE"
    plan_file = job.folder / "plan.json"
    slice_flags = [f"--slices={job.num_slices}"] if job.num_slices > 1 else []
    plan = [["plan", *job.run_flags, f"--topology={job.type}", *slice_flags,
             f"--json={plan_file}"]]  # fmt: skip
    create = [["tpu", "create", job.slices, f"--type={job.type}", *slice_flags, *job.create]]
    for name in job.datasets():
        yield _prepare(job, name)
    yield Stage("plan", plan, lambda: plan_file.exists() and notes.has("plan", plan))
    yield Stage(
        "create",
        create,
        lambda: (
            done_file.exists()
            or (notes.has("create", create) and slices.recall(job.slices) is not None)
        ),
    )
    train = [["tpu", "train", job.slices, f"--workdir={job.workdir}", *job.run_flags]]
    yield Stage("train", train, done_file.exists)
    delete = [["tpu", "delete", job.slices]]
    yield Stage("delete", delete, lambda: slices.recall(job.slices) is None)
    missing = _missing_sets(job, {} if dry_run else _metrics(job))
    file = job.folder / "metrics.json"
    evaluate = [["evaluate", f"--workdir={job.workdir}", *missing, f"--json={file}"]]
    yield Stage("evaluate", evaluate, lambda: not missing)


def _prepare(job: Job, dataset: str) -> Stage:
    """Returns the stage that prepares a dataset on this machine and copies it to the bucket."""
    where = [f"--data_dir={job.data_dir}"] if job.data_dir else []
    archives = [f"--manual_dir={job.manual_dir}"] if job.manual_dir else []
    commands = [
        ["prepare", dataset, *where, *archives],
        ["prepare", dataset, *where, f"--copy_to={job.tfds}"],
    ]
    folder = epath.Path(job.tfds) / dataset.partition(":")[0]

    def is_done() -> bool:  # This file is copied last.
        return any(folder.glob("*/dataset_info.json")) if folder.is_dir() else False

    return Stage(f"prepare {dataset}", commands, is_done)


def _missing_sets(job: Job, measured: Mapping[str, float]) -> list[str]:
    """Returns flags for the test sets of which the finished run has no metrics."""
    flags = []
    for name, keys in job.loaded.eval.sets.items():
        if not any(key.split("/")[0] == name for key in measured):
            flags += [f"--config.eval.sets.{name}.{key}={_text(keys[key])}" for key in keys]
    return flags


def _text(value: Any) -> str:
    """Returns a value of a config as a flag takes it: in one line, also where it is a mapping."""
    return str(value.to_dict() if isinstance(value, ConfigDict) else value)


def _metrics(job: Job) -> dict[str, float]:
    """Returns the metrics of the last step, `{"val/accuracy": ...}`, and those measured later."""
    later = job.folder / "metrics.json"
    found = json.loads(later.read_text()) if later.exists() else {}
    for row in read_metrics(job.workdir)[-1:]:
        found |= {
            name.removeprefix("eval/"): value
            for name, value in row.items()
            if name.startswith("eval/")
        }
    return found


def result(job: Job) -> dict[str, Any]:
    """Returns the result of a finished run: metrics, cost, and what is needed to repeat it."""
    record = Workdir.existing(job.workdir).read_record()
    plan = json.loads((job.folder / "plan.json").read_text())
    last = read_metrics(job.workdir)[-1]
    parts = {
        name.removeprefix("time/"): seconds
        for name, seconds in last.items()
        if name.startswith("time/")
    }
    hours = sum(s for name, s in parts.items() if name not in WITHIN_TRAIN) / 3600
    return {
        "recipe": job.recipe,
        "metrics": _metrics(job),
        "step": last["step"],
        "hours": hours,
        "seconds_of_parts": parts,
        "log": f"{job.name}.jsonl",
        "cost": cost(plan, hours, job.price),
        "topology": plan["topology"],
        "num_slices": plan["num_slices"],
        "num_chips": plan["num_chips"],
        "commit": record["commit"],
        "packages": record["packages"],
        "command": record["command"],
        "config": record["config"],
        "written": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def cost(plan: Mapping[str, Any], hours: float, price: float | None) -> dict[str, Any]:
    """Returns chip-hours and dollars: by the plan at each share of the peak, and as measured.

    hours: those of the run, without the time that slices waited for it.
    price: dollars of a chip-hour; None leaves the dollars out.
    """
    chip_hours = {f"planned at {mfu} MFU": at["chip_hours"] for mfu, at in plan["at_mfu"].items()}
    chip_hours["measured"] = hours * plan["num_chips"]
    found: dict[str, Any] = {"chip_hours": chip_hours, "dollars_per_chip_hour": price}
    if price is not None:
        found["dollars"] = {name: value * price for name, value in chip_hours.items()}
    return found


def filled(table: str, job: Job, metrics: Mapping[str, float]) -> str:
    """Returns the page of recipes with our numbers in the row of the job's command.

    Raises:
      UserError: no row has the command.
    """
    name, _, arguments = job.recipe.partition(":")
    command = f"`{name}.py{':' if arguments else ''}{arguments}`"
    scores = []
    for one, title in TITLES.items():
        accuracy = metrics.get(f"{one}_ema/accuracy", metrics.get(f"{one}/accuracy"))
        if accuracy is not None:
            scores.append(f"{title}{100 * accuracy:.2f}")
    cell = f"[{', '.join(scores)}](../results/{job.name}.json)"
    lines = table.split("\n")
    for number, line in enumerate(lines):
        cells = line.split(" | ")
        if len(cells) > 2 and cells[-1].removesuffix(" |") == command:
            lines[number] = " | ".join([*cells[:-2], cell, cells[-1]])
            return "\n".join(lines)
    raise UserError(f"docs/recipes.md has no row whose command is {command}; add {cell} by hand")


def write(job: Job) -> None:
    """Writes `results/NAME.json` and the log beside it, and fills the row of docs/recipes.md."""
    folder, found = job.root / "results", result(job)
    folder.mkdir(exist_ok=True)
    write_atomically(folder / f"{job.name}.jsonl", encode(read_metrics(job.workdir)))
    text = json.dumps(found, indent=1) + "\n"
    write_atomically(folder / f"{job.name}.json", text.encode())
    print(f"{folder / f'{job.name}.json'}: {json.dumps(found['metrics'])}")
    page = job.root / "docs" / "recipes.md"
    write_atomically(page, filled(page.read_text(), job, found["metrics"]).encode())


def reproduce(job: Job, call: Callable[[Command], int]) -> int:
    """Runs the stages whose outcome does not exist, then writes; returns the exit code."""
    notes = Notes(job.folder)
    job.folder.mkdir(parents=True, exist_ok=True)
    for stage in stages(job, notes):
        if stage.is_done():
            _say(f"{stage.name}: done already")
            continue
        for command in stage.commands:
            _say(f"{stage.name}: {program()} {shlex.join(command)}")
            if code := call(command):
                _say(f"{stage.name} ended with {code}; the same command goes on from here")
                if slices.recall(job.slices):
                    _say(f"the slices cost until {program()} tpu delete {job.slices}")
                return code
        notes.add(stage.name, stage.commands)
    write(job)
    return 0


def show(job: Job) -> None:
    """Prints the commands of all stages."""
    for stage in stages(job, Notes(job.folder), dry_run=True):
        print(f"# {stage.name}{', what the log of the run lacks' * (stage.name == 'evaluate')}")
        for command in stage.commands:
            print(f"{program()} {shlex.join(command)}")
    print(f"# write results/{job.name}.json, and the row of {job.recipe} in docs/recipes.md")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def call(command: Command) -> int:
    """Runs a command of `vit-jax` in a process of its own; returns its exit code."""
    return subprocess.run(
        [sys.executable, "-m", "vit_jax", *command], cwd=ROOT, check=False
    ).returncode


def parse(argv: Sequence[str]) -> tuple[Job, bool]:
    """Returns the job that the command line describes, and whether it is only printed."""
    parser = argparse.ArgumentParser(
        prog="scripts/reproduce.sh",
        description="Reproduce a recipe on TPU slices, from nothing to a row of the results table.",
        epilog="Other flags, such as --zone and --spot, go to `./run.sh tpu create`, and"
        " --config.KEY=VALUE goes to the run.",
        allow_abbrev=False,
    )
    parser.add_argument("recipe", metavar="NAME[:ARGS]", help="a recipe, such as vit_s16_i1k:300")
    parser.add_argument("--type", required=True, help="type of the slices, such as v5litepod-8")
    parser.add_argument(
        "--bucket",
        required=True,
        metavar="DIR",
        help="gs://BUCKET/..., or the absolute path of a disk that this machine and all hosts"
        " share: it gets the datasets, and the run",
    )
    parser.add_argument("--price", type=float, metavar="USD", help="dollars of a chip for an hour")
    parser.add_argument(
        "--sets",
        default="real+v2",
        metavar="NAMES",
        help="test sets besides val (default: %(default)s); docs/recipes.md lists them",
    )
    parser.add_argument("--name", default="", dest="pod", help="name of the slices")
    parser.add_argument("--slices", type=int, default=1, metavar="N", dest="num_slices")
    parser.add_argument("--data_dir", default="", help="folder here for the prepared datasets")
    parser.add_argument("--manual_dir", default="", help="folder of ImageNet's archives")
    parser.add_argument("--dry-run", action="store_true", help="print all commands, run none")
    arguments, others = parser.parse_known_args(argv)
    for other in others:
        if not other.startswith("--"):
            parser.error(f"unrecognized argument: {other}")
    fields = {name: value for name, value in vars(arguments).items() if name != "dry_run"}
    fields["bucket"] = arguments.bucket.rstrip("/")
    for name in ("data_dir", "manual_dir"):  # The commands run in the root of the checkout.
        if fields[name]:
            fields[name] = str(Path(fields[name]).expanduser().absolute())
    fields["overrides"] = [flag for flag in others if flag.startswith("--config.")]
    fields["create"] = [flag for flag in others if not flag.startswith("--config.")]
    return Job(**fields), arguments.dry_run


def main(argv: Sequence[str] | None = None) -> int:
    job, dry_run = parse(sys.argv[1:] if argv is None else argv)
    try:
        if dry_run:
            show(job)
            return 0
        return reproduce(job, call)
    except UserError as error:
        _say(f"error: {error}")
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
