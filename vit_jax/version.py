"""The version of this package, and the commit of its code. Imports the standard library alone."""

import subprocess
from pathlib import Path

__version__ = "0.1.0"

COMMIT_FILE = ".commit"
"""The file that holds the commit at the root of a copy of a checkout."""

PROJECT_FILE = "setup.cfg"
"""A file that lies at the root of a checkout, and not beside an installed package."""


def current_commit() -> str | None:
    """Returns the commit of this code; None where it is neither a checkout nor a copy of one."""
    root = Path(__file__).parent.parent
    # An installed package may lie inside a checkout of something else.
    return commit_of(root) if (root / PROJECT_FILE).exists() else None


def commit_of(folder: Path) -> str | None:
    """Returns the commit of a checkout, or of a copy of one.

    The commit of a checkout ends in `+` where files have changed since.
    """

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        ).stdout.strip()

    if (folder / COMMIT_FILE).exists():
        return (folder / COMMIT_FILE).read_text() or None
    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None
