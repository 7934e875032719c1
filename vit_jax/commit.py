"""Which commit of this code runs."""

import subprocess
from pathlib import Path

NOTE = ".commit"
"""File that tells it at the root of a copy of a checkout."""


def current() -> str | None:
    """The commit of this code; None where it is neither a checkout nor a copy of one."""
    return of(Path(__file__).parent.parent)


def of(folder: Path) -> str | None:
    """The commit of a checkout, with `+` where files have changed since, or of a copy of one."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        ).stdout.strip()

    if (folder / NOTE).exists():
        return (folder / NOTE).read_text() or None
    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None
