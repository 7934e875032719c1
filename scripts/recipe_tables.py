"""Writes the tables of ingredients in docs/recipes.md from the ledgers, `configs/NAME.csv`.

    python scripts/recipe_tables.py

The tables stand between two marks in the page. A test compares them with the ledgers.
"""

import csv
import json
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/recipes.md"
START = "<!-- The tables from here to the next mark are written by scripts/recipe_tables.py. -->"
END = "<!-- Here they end. -->"
# A setting that is named here is left out where it has this value, because it then does nothing.
NEUTRAL = {
    "optim.weight_decay": 0.0,
    "optim.clip_norm": 0.0,
    "task.label_smoothing": 0.0,
    "task.mixup": 0.0,
    "task.cutmix": 0.0,
    "task.mixing_groups": 1,
    "model.drop_path": 0.0,
    "model.layer_scale": None,
    "model.initialization": "vision_transformer",
    "data.repeats": 1,
    "ema_decay": 0.0,
    "optim.schedule.cooldown": 0,
}


def rows_of(path: Path) -> list[dict[str, str]]:
    """Returns the rows of a ledger."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def cases(path: Path) -> dict[str, dict]:
    """Returns the settings of each recipe of a file, by the recipe's name and arguments.

    The first recipe of a ledger has all settings, the others what differs from it.
    """
    found, first = {}, {}
    for row in rows_of(path):
        name = f"{path.stem}:{row['arguments']}".rstrip(":")
        settings = found.setdefault(name, dict(first))
        settings[row["key"]] = json.loads(row["value"])
        if len(found) == 1:
            first = settings
    return found


def said(settings: dict, *keys: str) -> str:
    """Returns the settings that do something, as `name value`, joined by commas."""
    used = [key for key in keys if key in settings and settings[key] != NEUTRAL.get(key, ...)]
    return ", ".join(f"{key.rpartition('.')[2]} {shown(settings[key])}" for key in used)


def shown(value: object) -> str:
    """Returns a number with at most five digits, and everything else as it is."""
    if isinstance(value, list):
        return "[" + ", ".join(map(shown, value)) + "]"
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def table(head: list[str], rows: list[list[str]]) -> str:
    """Returns a table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        "| " + " | ".join(x.replace("|", "\\|") for x in line) + " |" for line in lines
    )


def training_table(recipes: dict[str, dict]) -> str:
    """Returns the table of what recipes train with."""
    rows = []
    for name, of in recipes.items():
        optimizer = f"{of['optim.name']}, {said(of, 'optim.lr', 'optim.weight_decay')}"
        schedule = said(of, "optim.schedule.warmup", "optim.schedule.cooldown")
        loss = of.get("task.loss", of.get("task.name", "softmax"))
        rows.append([
            f"`{name}`",
            f"{of['batch_size']}, {of['total']}",
            ", ".join(filter(None, (optimizer, said(of, "optim.clip_norm", "ema_decay")))),
            f"{of['optim.schedule.name']}, {schedule}",
            ", ".join(filter(None, (loss, said(of, "task.label_smoothing", "model.drop_path")))),
            said(of, "task.mixup", "task.cutmix", "task.mixing_groups", "data.repeats"),
            said(of, "model.initialization", "model.layer_scale"),
        ])  # fmt: skip
    head = ["recipe", "batch, length", "optimizer", "schedule", "loss", "mixing", "initial values"]
    return table(head, rows)


def images_table(recipes: dict[str, dict]) -> str:
    """Returns the table of training images; a recipe with those of the one above has no row."""
    rows = []
    for name, settings in recipes.items():
        row = [f"`{name}`", f"`{settings['data.pp']}`"]
        if not rows or rows[-1][1] != row[1]:
            rows.append(row)
    return table(["recipe", "training images"], rows)


def differences_table(paths: list[Path]) -> str:
    """Returns the table of settings whose source has another value.

    What a recipe says several times, for its stages and sizes, has one row, with the first source.
    """
    rows: dict[tuple[str, str], tuple[str, list[str]]] = {}
    for path in paths:
        for row in rows_of(path):
            unknown = "not looked up" if "not looked up" in row["source"] else ""
            if row["theirs"] or unknown:
                reason = path.stem, row["theirs"] or unknown
                _, keys = rows.setdefault(reason, (row["source"], []))
                keys.extend({row["key"]} - set(keys))
    lines = [[f"`{n}`", keys_said(keys), theirs, s] for (n, theirs), (s, keys) in rows.items()]
    return table(["recipe", "setting", "theirs", "source"], lines)


def keys_said(keys: list[str]) -> str:
    """Returns keys joined by commas; more than two of one section as `section.*`."""
    sections = [key.rpartition(".")[0] for key in keys]
    names = [f"{s}.*" if sections.count(s) > 2 else k for k, s in zip(keys, sections, strict=True)]
    return ", ".join(f"`{name}`" for name in dict.fromkeys(names))


def tables() -> str:
    """Returns all tables with their titles."""
    paths = sorted((ROOT / "configs").glob("*.csv"))
    recipes = {name: of for path in paths for name, of in cases(path).items()}
    return "\n\n".join([
        "**What recipes train with.** What is neutral is left out, such as a decay of 0.",
        training_table(recipes),
        "**What training images go through**, after which they are normalized.",
        images_table(recipes),
        "**What differs from the source**, or could not be looked up; the docstrings say why.",
        differences_table(paths),
    ])  # fmt: skip


def main() -> None:
    """Writes the tables into the page."""
    page = PAGE.read_text()
    before, _, rest = page.partition(START)
    after = rest.partition(END)[2]
    PAGE.write_text(f"{before}{START}\n\n{tables()}\n\n{END}{after}")


if __name__ == "__main__":
    main()
