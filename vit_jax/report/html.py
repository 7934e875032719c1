"""The report of a run: one self-contained HTML file, made only from the files in its workdir.

Missing or malformed data is left out, so that an interrupted or unfinished run has a report too.

The report reads the metrics log, the saved sections and `config.json`, which holds `config`, the
nested configuration, and other facts about the run, such as `commit` and `versions`. The report
shows these metrics in special places:

- `model/num_params`: the number of parameters of the model.
- `time/train`: the seconds since the first step, which include `time/input wait`, `time/eval` and
  `time/save`. They do not include `time/start`, `time/setup`, `time/compile`, `time/report` and
  `time/lost to restart`. The last value of each is shown.
- `train/images_per_sec`, `train/mfu`: their medians are headlines.
- `train/goodput`: its last value is a headline.
"""

import base64
import itertools
import json
import logging
import math
import re
import shlex
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from etils import epath

from vit_jax import storage
from vit_jax.errors import UserError
from vit_jax.report import curves
from vit_jax.report.sections import FOLDER, StoredSection, read_sections
from vit_jax.storage import write_atomically
from vit_jax.tracking import WITHIN_TRAIN, Metric, headline, read_metrics
from vit_jax.tracking.console import format_duration
from vit_jax.tracking.metrics import from_json, meaning
from vit_jax.tracking.plain_text import one_line

if TYPE_CHECKING:
    import jinja2
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)

REPORT_NAME = "report.html"
CURVES_NAME = "curves.png"

Row = Mapping[str, int | float]

_ANCHORS = ("learning-curves", "final-metrics", "time", "again")
"""The headings that the page always has."""

_MAX_LEGEND = 12
_MAX_ROWS = 12  # Of the table behind a chart.
_NOT_FACTS = ("config", "version", "headline", "metrics")


def write_report(workdir: epath.PathLike, *, is_done: bool | None = None) -> epath.Path:
    """Writes `WORKDIR/report.html` and `WORKDIR/report/curves.png`; returns the former's path.

    Args:
      workdir: directory of the run.
      is_done: whether the run reached its last step; None checks whether the file `DONE` exists.

    Raises:
      UserError: there is no such directory, or a file in it cannot be read or written.
    """
    workdir = epath.Path(workdir)
    if not workdir.is_dir():
        raise UserError(f"workdir {workdir}: no such directory; name one that a run has written to")
    rows, stored = read_metrics(workdir), read_config(workdir)
    path = workdir / REPORT_NAME
    try:
        page = render(
            name=workdir.name,
            stored=stored,
            rows=rows,
            sections=read_sections(workdir),
            is_done=(workdir / "DONE").exists() if is_done is None else is_done,
        )
        _save_curves(workdir / FOLDER, rows, from_json(stored.get("metrics")))
        # File names that are not valid UTF-8 cannot be encoded without an error handler.
        write_atomically(path, page.encode("utf-8", "backslashreplace"))
    except storage.errors() as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot write the report ({reason})") from error
    return path


def render(
    name: str,
    stored: Mapping[str, Any],
    rows: Sequence[Row],
    sections: Sequence[StoredSection],
    is_done: bool,
) -> str:
    """Returns the page, made from the parts that `write_report` reads.

    Args:
      name: the name of the run.
      stored: the content of `config.json`.
      rows: the rows of the metrics log.
      sections: the saved sections, in order.
      is_done: whether the run reached its last step.
    """
    config, metric_info = _mapping(stored.get("config")), from_json(stored.get("metrics"))
    last = _last_values(rows)
    charts = [drawn(chart) for chart in curves.charts(rows, metric_info)]
    return (
        environment()
        .get_template("template.html")
        .render(
            name=name,
            title=_title(config) or name,
            status=_status(rows, is_done),
            tiles=_tiles(stored, rows, last, metric_info),
            main_charts=[chart for chart in charts if chart["is_main"]],
            more_charts=[chart for chart in charts if not chart["is_main"]],
            scores=_scores(rows, metric_info),
            sections=list(zip(sections, anchors([one.title for one in sections]), strict=True)),
            timing=_timing(last),
            config=_config_groups(config),
            facts=_facts(stored),
        )
    )


def environment() -> "jinja2.Environment":
    """Returns what renders the templates of this folder."""
    import jinja2

    made = jinja2.Environment(
        loader=jinja2.PackageLoader("vit_jax.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters["data_uri"] = _data_uri
    return made


def read_config(workdir: epath.Path) -> Mapping[str, Any]:
    """Returns the content of a run's `config.json`; {} if there is none."""
    path = workdir / "config.json"
    if not path.exists():
        return {}
    try:
        stored = storage.parse_json(storage.read_bytes(path))
    except storage.errors(ValueError) as error:
        reason = one_line(getattr(error, "strerror", None) or str(error))
        raise UserError(f"{path}: not valid JSON ({reason}); restore it or remove it") from error
    if not isinstance(stored, Mapping):
        raise UserError(f"{path}: not the config of a run; restore it or remove it")
    return stored


def _mapping(value: Any) -> Mapping[str, Any]:
    """Returns `value` if it is a mapping, and otherwise an empty mapping."""
    return value if isinstance(value, Mapping) else {}


def _save_curves(
    folder: epath.Path, rows: Sequence[Row], metric_info: Mapping[str, Metric]
) -> None:
    from vit_jax.report import figures

    png = _attempt(
        lambda: figures.learning_curves(rows, metric_info), figures.png, "the learning curves"
    )
    if png is not None:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / CURVES_NAME, png)


def _attempt(
    draw: "Callable[[], Figure | None]", save: "Callable[[Figure], bytes]", what: str
) -> bytes | None:
    """Returns the bytes of a picture; None if there is none, or if drawing or saving it fails."""
    try:
        figure = draw()
        return None if figure is None else save(figure)
    except Exception as error:
        reason = one_line(str(error), 200) or type(error).__name__
        logger.warning("%s cannot be drawn: %s", one_line(what), reason)
        return None


def _data_uri(picture: bytes) -> str:
    kind = "png" if picture.startswith(b"\x89PNG") else "svg+xml"
    return f"data:image/{kind};base64," + base64.b64encode(picture).decode()


def _last_values(rows: Sequence[Row]) -> dict[str, tuple[int, float]]:
    """Returns metric → (step, value) of its last row with a finite value."""
    return {
        name: (int(row["step"]), value)
        for row in rows
        for name, value in row.items()
        if name != "step" and math.isfinite(value)
    }


def _title(config: Mapping[str, Any]) -> str:
    model = str(_mapping(config.get("model")).get("name") or "")
    data = _mapping(config.get("data"))
    dataset = str(data.get("name") or data.get("source") or "").rstrip("/").rpartition("/")[2]
    return " on ".join(part for part in (model, dataset) if part)


def _status(rows: Sequence[Row], is_done: bool) -> dict[str, str]:
    if is_done:
        return {"kind": "done", "text": "finished"}
    if rows:
        return {"kind": "partial", "text": f"up to step {rows[-1]['step']:,}"}
    return {"kind": "partial", "text": "nothing logged yet"}


def _tiles(
    stored: Mapping[str, Any],
    rows: Sequence[Row],
    last: Mapping[str, tuple[int, float]],
    metric_info: Mapping[str, Metric],
) -> list[dict[str, str]]:
    """Returns the headline numbers, each with a label, a value and a note."""
    tiles = []

    def add(label: str, value: str, note: str = "") -> None:
        tiles.append({"label": label, "value": value, "note": note})

    # Runs from before tasks had a headline were judged by their accuracy.
    score = headline(str(stored.get("headline", "accuracy")), last)
    if score is not None:
        is_fraction = meaning(score, metric_info).unit == "fraction"
        value = curves.format_value(last[score][1], is_fraction)
        add(curves.readable(score), value, _out_of(score, last))
    if "model/num_params" in last:
        add("parameters", curves.compact(last["model/num_params"][1]))
    if rows:
        batch_size = _mapping(stored.get("config")).get("batch_size")
        note = f"of {batch_size:,} images" if isinstance(batch_size, int) else ""
        add("steps", f"{rows[-1]['step']:,}", note)
    if "time/train" in last:
        add("time", format_duration(last["time/train"][1]), "of training")
    rates = _finite(rows, "train/images_per_sec")
    if rates:
        add("images per second", curves.format_value(round(statistics.median(rates))), "median")
    utilization = _finite(rows, "train/mfu")
    if utilization:
        add("of the chips' peak", f"{statistics.median(utilization):.1%}", "MFU, median")
    if "train/goodput" in last:
        add("goodput", f"{last['train/goodput'][1]:.0%}", "time in which steps ran")
    return tiles


def _finite(rows: Sequence[Row], name: str) -> list[float]:
    return [row[name] for row in rows if name in row and math.isfinite(row[name])]


def _out_of(score: str, last: Mapping[str, tuple[int, float]]) -> str:
    """Returns a note with the number of examples of the score, as the same evaluation logged it."""
    folder = score.rpartition("/")[0]
    count = last.get(f"{folder}/num_examples")
    if count is None:
        return ""
    value = last[score][1]
    if curves.kind(score) == "accuracy" and 0 <= value <= 1:
        return f"{round(value * count[1]):,} of {count[1]:,}"
    return f"{count[1]:,} examples"


def drawn(chart: curves.Chart, colors: Sequence[int] = ()) -> dict[str, Any]:
    """Returns what the templates show of a chart.

    colors: a number for each line, from those of the series; in their order by default.
    """
    from vit_jax.report import figures

    return {
        "title": chart.title,
        "note": chart.note,
        "alt": _alt(chart),
        "table": _points(chart),
        "drawing": _attempt(
            lambda: figures.learning_curve(chart, colors), figures.svg, chart.title
        ),
        "is_main": chart.is_main,
        "legend": [
            {"label": series.label, "last": curves.format_value(series.last, series.is_fraction)}
            for series in chart.series
        ]
        if chart.needs_legend and len(chart.series) <= _MAX_LEGEND
        else [],
    }


def anchors(titles: Sequence[str]) -> list[str]:
    """Returns names of headings in the page's address, in the letters of any alphabet; all differ.

    A link from outside stays valid as long as no section of an equal name is put before.
    """
    found: list[str] = []
    for title in titles:
        base = re.sub(r"\W+", "-", title.lower()).strip("-_") or "section"
        names = itertools.chain([base], (f"{base}-{number}" for number in itertools.count(2)))
        found.append(next(name for name in names if name not in (*_ANCHORS, *found)))
    return found


def _alt(chart: curves.Chart) -> str:
    """Returns a chart in words: its lines, and the value that each of them ends with."""
    ends = [
        f"{one.label} ends at {curves.format_value(one.last, one.is_fraction)}"
        for one in chart.series[:_MAX_LEGEND]
    ]
    return f"{chart.title} by step: {'; '.join(ends)}"


def _points(chart: curves.Chart) -> list[list[str]]:
    """Returns a table of a chart: a row for each of some steps, and a column for each line.

    It is empty for a chart of many lines, whose last values are among the final metrics.
    """
    lines = chart.series
    if len(lines) > _MAX_LEGEND:
        return []
    steps = sorted({step for one in lines for step, _ in one.points})
    picked = {round(i * (len(steps) - 1) / (_MAX_ROWS - 1)) for i in range(_MAX_ROWS)}
    values = [dict(one.points) for one in lines]
    rows = [["step", *(one.label for one in lines)]]
    for step in (steps[i] for i in sorted(picked)):
        cells = [
            curves.format_value(found[step], one.is_fraction) if step in found else ""
            for one, found in zip(lines, values, strict=True)
        ]
        rows.append([f"{step:,}", *cells])
    return rows


def _scores(rows: Sequence[Row], metric_info: Mapping[str, Metric]) -> list[dict[str, str]]:
    """Returns the final value of every evaluated metric, and its best value with its step."""
    scores = []
    names = dict.fromkeys(name for row in rows for name in row if name.startswith("eval/"))
    for name in sorted(names):
        points = [(row["step"], row[name]) for row in rows if name in row]
        info = meaning(name, metric_info)
        is_fraction = info.unit == "fraction"
        score = {
            "name": one_line(name),
            "words": curves.readable(name),
            "final": curves.format_value(points[-1][1], is_fraction),
            "best": "",
            "step": "",
        }
        best = None
        for step, value in points:
            if info.is_better(value, best and best[1]):
                best = (step, value)
        if best:
            step, value = best
            score |= {"best": curves.format_value(value, is_fraction), "step": f"{step:,}"}
        scores.append(score)
    return scores


def _timing(last: Mapping[str, tuple[int, float]]) -> dict[str, Any] | None:
    """Returns the parts of the run's time, largest first; they add up to the total."""
    parts = {
        name.removeprefix("time/"): value
        for name, (_, value) in last.items()
        if name.startswith("time/") and value > 0
    }
    if "train" in parts:
        within = sum(parts.get(name, 0.0) for name in WITHIN_TRAIN)
        parts["steps"] = max(0.0, parts.pop("train") - within)
    total = sum(parts.values())
    if not total:
        return None
    return {
        "total": format_duration(total),
        "parts": [
            {
                "name": name.replace("_", " "),
                "percent": 100 * seconds / total,
                "text": f"{format_duration(seconds)} · {seconds / total:.0%}",
            }
            for name, seconds in sorted(parts.items(), key=lambda part: -part[1])
        ],
    }


def _config_groups(config: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Returns the configuration as groups of (dotted key, value), plain keys first."""
    plain = [(key, _shown(value)) for key, value in config.items() if not _is_section(value)]
    groups = [("", plain)] if plain else []
    for key, value in config.items():
        if _is_section(value):
            groups.append((key, list(flat(value, key))))
    return groups


def _is_section(value: Any) -> bool:
    return isinstance(value, Mapping) and bool(value)


def flat(section: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, str]]:
    """Yields the values of a config as text, by dotted key."""
    for key, value in section.items():
        dotted = f"{prefix}.{key}" if prefix else key
        if _is_section(value):
            yield from flat(value, dotted)
        else:
            yield dotted, _shown(value)


def _shown(value: Any) -> str:
    return value if isinstance(value, str) and value else json.dumps(value)


def _facts(stored: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Returns the other contents of `config.json`, such as commit, versions and devices."""
    facts: list[tuple[str, str]] = []
    for key, value in stored.items():
        if key in _NOT_FACTS or value in (None, "", {}, []):
            continue
        if key == "command" and isinstance(value, list):
            facts.append((key, shlex.join(map(str, value))))
        elif isinstance(value, Mapping):
            facts += [(name.removeprefix(f"{key}."), text) for name, text in flat(value, key)]
        else:
            facts.append((key.replace("_", " "), _shown(value)))
    return facts
