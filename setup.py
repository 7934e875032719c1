"""Adds what setup.cfg cannot say: the recipes of `configs/`, and a readme whose links hold."""

import configparser
import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def repository():
    """Returns the address of the repository in setup.cfg, without which the readme has no links.

    setup.cfg names it in `project_urls`, as in `Repository = https://HOST/USER/REPO`.
    """
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg", encoding="utf-8")
    urls = settings["metadata"].get("project_urls", "")
    found = re.search(r"^Repository *= *(\S+)$", urls, re.MULTILINE)
    return found[1] if found else ""


def readme(repository):
    """Returns README.md with whole links in the place of those that lead to files beside it.

    Without a repository they are plain text, and pictures are left out.
    """

    def whole(link):
        picture, text, place = link.groups()
        if not repository:
            return "" if picture else text
        return f"{picture}[{text}]({repository}/{'raw' if picture else 'blob'}/HEAD/{place})"

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.sub(r"(!?)\[([^]]*)\]\((?!#|\w+:)([^)]+)\)", whole, text)


if __name__ == "__main__":
    setup(
        packages=[*find_packages(include=["vit_jax*"]), "vit_jax.configs"],
        package_dir={"vit_jax.configs": "configs"},
        long_description=readme(repository()),
        long_description_content_type="text/markdown",
    )
