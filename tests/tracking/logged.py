"""Rows that tests write to the metrics log."""

from pathlib import Path

from vit_jax.tracking import MetricsLog


def write_rows(workdir, rows, resume_step=0, **options):
    writer = MetricsLog(workdir, resume_step=resume_step, **options)
    for row in rows:
        writer.write(row["step"], {name: value for name, value in row.items() if name != "step"})
    writer.close()


def losses(steps, offset=0.0):
    return [{"step": step, "train/loss": step / 7 + offset} for step in steps]


def log_lines(workdir):
    return (Path(workdir) / "metrics.jsonl").read_text().splitlines()
