"""Several runs side by side: one HTML file with their curves, metrics and differences in config."""

import dataclasses
import itertools
import os
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from vit_jax import storage
from vit_jax.errors import UserError
from vit_jax.report import curves, html
from vit_jax.tracking import Metric, read_metrics
from vit_jax.tracking.metrics import from_json, meaning
from vit_jax.tracking.plain_text import distinct, one_line

Rows = Sequence[Mapping[str, int | float]]


def write_comparison(workdirs: Sequence[epath.PathLike], out: epath.PathLike) -> epath.Path:
    """Writes a page that compares runs, and returns its path.

    Args:
      workdirs: at least two, in the order of the columns.
      out: the file to write.

    Raises:
      UserError: a workdir or its log cannot be read, or the page cannot be written.
    """
    folders = [epath.Path(workdir) for workdir in workdirs]
    logs = [read_metrics(folder) for folder in folders]
    stored = [html.read_config(folder) for folder in folders]
    metric_info = {
        name: info for one in stored for name, info in from_json(one.get("metrics")).items()
    }
    names = names_of([os.fspath(folder) for folder in folders])
    page = (
        html.environment()
        .get_template("comparison.html")
        .render(
            names=names,
            paths=[one_line(os.fspath(folder)) for folder in folders],
            metrics=_metrics(logs, metric_info),
            differences=_differences([one.get("config") for one in stored]),
            charts=_charts(names, logs, metric_info),
        )
    )
    path = epath.Path(out)
    try:
        storage.write_atomically(path, page.encode("utf-8", "backslashreplace"))
    except storage.errors() as error:
        raise UserError(f"{path}: cannot write the comparison ({error})") from error
    return path


def names_of(paths: Sequence[str]) -> list[str]:
    """Returns the shortest ends of paths, in whole folders, that tell them apart.

    Names that are equal, such as those of a run that is given twice, are numbered.
    """
    parts = [path.rstrip("/").split("/") for path in paths]
    for count in itertools.count(1):
        names = ["/".join(part[-count:]) for part in parts]
        if len({*names}) == len({*paths}) or count >= max(map(len, parts)):
            return list(distinct(names))
    raise AssertionError("the paths have an end")


def _metrics(logs: Sequence[Rows], info: Mapping[str, Metric]) -> list[dict[str, Any]]:
    """Returns the last value of each evaluated metric in each run; `best` are the best columns."""
    last = [
        {name: value for row in rows for name, value in row.items() if name.startswith("eval/")}
        for rows in logs
    ]
    found = []
    for name, label in curves.labels(sorted({name for one in last for name in one})).items():
        told = meaning(name, info)
        best: float | None = None
        for value in (one[name] for one in last if name in one):
            best = value if told.is_better(value, best) else best
        cells = [
            curves.format_value(one[name], told.unit == "fraction") if name in one else ""
            for one in last
        ]
        columns = [i for i, one in enumerate(last) if best is not None and one.get(name) == best]
        found.append({"name": label, "cells": cells, "best": columns})
    return found


def _differences(configs: Sequence[Any]) -> list[dict[str, Any]]:
    """Returns the config keys whose values differ, with the value in each run."""
    flat = [dict(html.flat(one, "")) if isinstance(one, Mapping) else {} for one in configs]
    keys = dict.fromkeys(key for one in flat for key in one)
    rows = [(key, [one.get(key, "") for one in flat]) for key in keys]
    return [{"name": key, "cells": cells, "best": []} for key, cells in rows if len({*cells}) > 1]


def _charts(
    names: Sequence[str], logs: Sequence[Rows], info: Mapping[str, Metric]
) -> list[dict[str, Any]]:
    """Returns a chart for each main metric, with a line for each run."""
    lines: dict[str, list[tuple[int, curves.Series]]] = {}
    scales: dict[str, str] = {}
    for run, rows in enumerate(logs):
        for chart in curves.charts(rows, info):
            for series in chart.series if chart.is_main else ():
                scales[series.metric] = chart.scale
                line = dataclasses.replace(series, label=names[run])
                lines.setdefault(series.metric, []).append((run, line))
    return [
        html.drawn(
            curves.Chart(
                label[:1].upper() + label[1:],
                tuple(line for _, line in lines[metric]),
                scale=scales[metric],
            ),
            colors=[run for run, _ in lines[metric]],
        )
        for metric, label in curves.labels(lines).items()
    ]
