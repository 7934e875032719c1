"""Prints how the package is laid out and how far a value travels, against the bars of the design.

    python scripts/house.py                     # counts that need no run
    python scripts/house.py --batch CONFIG ...  # and the files that a training batch crosses

A batch crosses a file when a function of that file runs on the way from the source to the loss; the
config file counts. The files of the model are counted apart. Files that handle gradients or check
names are not on the way.
"""

import argparse
import ast
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "vit_jax"

BARS = {
    "modules in vit_jax/": 8,
    "packages in vit_jax/": 17,
    "lines of the longest file": 450,
    "lines of the longest function": 60,
    "files that name the mesh axis fsdp": 3,
}

LR_WAY = (
    "config/loading.py",
    "training/run.py",
    "optim/optimizer.py",
    "optim/schedules.py",
    "training/step.py",
    "training/loop.py",
    "tracking/step_log.py",
    "tracking/log.py",
)
"""The files that handle the learning rate on its way from the config to the log, as we read them.

The design allows 8. No test measures this way; each file on it names the value, or the section or
the row that holds it.
"""

BESIDE_THE_WAY = (
    "optim/",
    "config/section.py",
    "training/spikes.py",
    "errors.py",
    "plugins.py",
)
"""Files that run while a step is traced, but do not handle the batch."""


def sources() -> Iterator[tuple[Path, str]]:
    """Yields every Python file of the package with its text."""
    for path in sorted(PACKAGE.rglob("*.py")):
        yield path, path.read_text()


def longest_function() -> tuple[int, str]:
    """Returns (lines, place) of the longest function, the training loop's left out."""
    found = []
    for path, text in sources():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                place = f"{path.relative_to(PACKAGE)}:{node.name}"
                found.append((node.end_lineno - node.lineno + 1, place))
    return max(one for one in found if not one[1].startswith("training/loop.py"))


def counts() -> dict[str, int]:
    """Returns the counts that `BARS` limits."""
    files = list(sources())
    return {
        "modules in vit_jax/": len(list(PACKAGE.glob("*.py"))),
        "packages in vit_jax/": len(list(PACKAGE.glob("*/__init__.py"))),
        "lines of the longest file": max(text.count("\n") for _, text in files),
        "lines of the longest function": longest_function()[0],
        "files that name the mesh axis fsdp": sum('"fsdp"' in text for _, text in files),
    }


def batch_way(config_spec: str) -> tuple[list[str], list[str]]:
    """Returns the files that one training batch crosses: those of the way, those of the model."""
    from vit_jax import config as config_lib
    from vit_jax.training.run import Run

    run = Run.build(config_lib.load(config_spec))
    ran: set[str] = set()

    def note(frame, event: str, _) -> None:
        if event == "call" and frame.f_code.co_name != "<module>":
            ran.add(frame.f_code.co_filename)

    threading.setprofile(note)
    sys.setprofile(note)
    try:
        with run.open_feed(0) as feed:
            feed.next_batch()
        run.trace_step()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    ours = sorted(
        str(Path(name).relative_to(PACKAGE)) for name in ran if Path(name).is_relative_to(PACKAGE)
    )
    ours = [name for name in ours if not name.startswith(BESIDE_THE_WAY)]
    model = [name for name in ours if name.startswith("models/")]
    return [config_spec.partition(":")[0], *(n for n in ours if n not in model)], model


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", nargs="*", default=[], metavar="CONFIG", help="Config files.")
    arguments = parser.parse_args()
    lines = sum(text.count("\n") for _, text in sources())
    print(f"lines of the package: {lines:,}")
    failed = False
    for name, count in counts().items():
        verdict = "" if count <= BARS[name] else f"  MORE THAN {BARS[name]}"
        failed |= bool(verdict)
        print(f"{name}: {count} (at most {BARS[name]}){verdict}")
    print("longest function:", *longest_function())
    print(f"files that lr crosses, by reading: {len(LR_WAY)} (at most 8)")
    for spec in arguments.batch:
        way, model = batch_way(spec)
        print(f"\na batch of {spec} crosses {len(way)} files, and {len(model)} of the model:")
        print("  " + "\n  ".join([*way, *model]))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
