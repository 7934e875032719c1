"""`python -m vit_jax.launch.archive FILE` packs this checkout for the hosts, which get a copy."""

import io
import subprocess
import sys
import tarfile
from pathlib import Path

from vit_jax.errors import UserError
from vit_jax.version import COMMIT_FILE, PROJECT_FILE, commit_of

REPOSITORY = Path(__file__).parent.parent.parent


def pack(folder: Path, tar: Path) -> None:
    """Writes the files of a git checkout, with uncommitted changes and a note of the commit.

    Files that git ignores are left out.

    Raises:
      UserError: the package was not installed from a checkout.
    """
    listing = ["git", "-C", str(folder), "ls-files", "-co", "--exclude-standard", "-z"]
    done = subprocess.run(listing, capture_output=True, text=True, check=False)
    names = [name for name in done.stdout.split("\0") if name and (folder / name).exists()]
    # In an environment that a checkout of something else ignores, git lists nothing.
    if done.returncode or PROJECT_FILE not in names:
        raise no_checkout(folder)
    tar.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(tar, "w:gz") as file:
        for name in names:
            file.add(folder / name, name)
        told = (commit_of(folder) or "").encode()
        note = tarfile.TarInfo(COMMIT_FILE)
        note.size = len(told)
        file.addfile(note, io.BytesIO(told))


def no_checkout(folder: Path) -> UserError:
    """Returns the error that the package was not installed from a checkout."""
    return UserError(f"{folder} is no git checkout; clone the repository, and use its ./run.sh")


if __name__ == "__main__":
    try:
        pack(REPOSITORY, Path(sys.argv[1]))
    except UserError as error:
        raise SystemExit(f"error: {error}") from error
