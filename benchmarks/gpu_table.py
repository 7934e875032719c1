"""The Markdown of a run of `gpu.py`, for docs/performance.md."""

from collections.abc import Iterator, Mapping
from typing import Any

PROGRAMS = {
    "xla": "ours, XLA's attention",
    "cudnn": "ours, cuDNN's attention",
    "auto": "ours",
    "timm": "timm, `torch.compile`",
}
HEAD = (
    "| step | images | program | images/s | share of the matmul rate | of the peak | memory, GiB"
    " | compiled in, s | timm's time over it |",
    "|---|---|---|---|---|---|---|---|---|",
)
CHECKS = ("float32_outputs", "bfloat16", "fused_attention")


def markdown(run: Mapping[str, Any]) -> str:
    """Returns the facts of a run, its steps as a table, its checks, and what was not measured."""
    measured = run["measured"]
    packages = ", ".join(f"{name} {version}" for name, version in run["packages"].items())
    sizes = "" if run["sizes"] == "full" else f" Sizes: {run['sizes']}, which tell no speed."
    lines = [
        f"{run['machine']['device']}, {run['date']}, commit {str(run['commit'])[:12]}, {packages};"
        f" bfloat16. `benchmarks/gpu.sh`.{sizes}",
        "",
        *HEAD,
    ]
    for name, result in measured.items():
        lines += _steps(name, result)
    host = measured.get("host", {})
    if "images_per_sec" in host:
        lines += ["", f"The host prepares {host['images_per_sec']:,.0f} images/s,"]
        lines[-1] += f" {host['images_per_sec_per_core']:,.0f} on each core."
    lines += ["", *_checks(measured), *_missing(measured)]
    return "\n".join(lines).rstrip()


def _steps(name: str, result: Mapping[str, Any]) -> Iterator[str]:
    for key, program in PROGRAMS.items():
        numbers = result.get(key, {})
        if "images_per_sec" not in numbers:
            continue
        cells = (
            name,
            str(result["batch_size"]),
            program,
            f"{numbers['images_per_sec']:,.0f}",
            f"{numbers['matmul_fraction']:.0%}",
            _text(numbers.get("mfu"), "{:.0%}"),
            _text(numbers.get("device_bytes"), "{:.1f}", 2**30),
            f"{numbers['compile_seconds']:.0f}",
            _text(numbers.get("timm_time_ratio"), "{:.2f}"),
        )
        yield f"| {' | '.join(cells)} |"


def _text(value: float | None, form: str, unit: float = 1) -> str:
    return "" if value is None else form.format(value / unit)


def _checks(measured: Mapping[str, Any]) -> Iterator[str]:
    for name in CHECKS:
        for what, error in measured.get(name, {}).get("errors", {}).items():
            bound = measured[name]["bounds"][what]
            yield f"- {name}, {what}: off by {error:.1e}, within {bound:.1e}."


def _missing(measured: Mapping[str, Any]) -> Iterator[str]:
    """Yields the reason of each measurement, or part of one, that was not taken."""
    for name, result in measured.items():
        parts = {name: result, **{f"{name}, {key}": result.get(key, {}) for key in PROGRAMS}}
        for what, part in parts.items():
            for kind in ("skipped", "wrong", "error"):
                if kind in part:
                    yield f"- {what}: not measured: {part[kind]}."
