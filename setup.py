"""Adds what setup.cfg cannot say: the recipes of `configs/`, and links that hold on an index."""

import re
import subprocess
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def address():
    """Returns the address of the repository that this is a clone of, or "" if it is not public.

    A source distribution names the repository of the clone that it was made from.
    """
    if (ROOT / "PKG-INFO").exists():
        noted = re.search(r"^Project-URL: Repository, (.+)$", (ROOT / "PKG-INFO").read_text(), re.M)
        return noted[1] if noted else ""
    if not (ROOT / ".git").exists():
        return ""
    git = ["git", "-C", str(ROOT), "remote", "get-url", "origin"]
    try:
        origin = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
    return web_address(origin)


def web_address(origin):
    """Returns where a browser finds a remote repository of git, without what is secret in it."""
    found = re.fullmatch(
        r"(?:(?:https|ssh)://(?:[^@/]*@)?([\w.-]+)(?::\d+)?/|git@([\w.-]+):)(.+?)(?:\.git)?/?",
        origin,
    )
    return f"https://{found[1] or found[2]}/{found[3]}" if found else ""


def readme(address):
    """Returns README.md with whole links in the place of those that lead to files beside it.

    Without an address they are plain text, and pictures are left out.
    """

    def whole(link):
        picture, text, place = link.groups()
        if not address:
            return "" if picture else text
        return f"{picture}[{text}]({address}/{'raw' if picture else 'blob'}/HEAD/{place})"

    text = (ROOT / "README.md").read_text()
    return re.sub(r"(!?)\[([^]]*)\]\((?!#|\w+:)([^)]+)\)", whole, text)


def urls(address):
    """Returns the links beside the description on an index."""
    if not address:
        return {}
    return {
        "Repository": address,
        "Documentation": f"{address}#readme",
        "Changelog": f"{address}/blob/HEAD/CHANGELOG.md",
    }


if __name__ == "__main__":
    setup(
        packages=[*find_packages(include=["vit_jax*"]), "vit_jax.configs"],
        package_dir={"vit_jax.configs": "configs"},
        long_description=readme(address()),
        long_description_content_type="text/markdown",
        project_urls=urls(address()),
    )
