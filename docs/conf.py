"""Settings of the documentation's site: `sphinx-build -W docs build/docs` writes it."""

import re
from importlib.metadata import version as version_of
from pathlib import Path

DOCS = Path(__file__).parent

project = "vit_jax"
copyright = "the vit_jax authors"
version = release = version_of("vit-jax")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["**/.*"]
html_theme = "furo"
html_title = f"vit_jax {version}"

# The pages are written to be read in the repository, too: headings are anchors, as there.
myst_heading_anchors = 4

default_role = "code"  # Docstrings are Markdown as far as that goes: one backtick is code.
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
napoleon_numpy_docstring = False
napoleon_use_ivar = True


def setup(app):
    app.connect("source-read", put_readme_first)
    app.connect("autodoc-process-docstring", keep_examples, priority=400)  # Before napoleon.


def put_readme_first(app, name, source):
    """Puts the README, with links as they are from this folder, at the top of the first page."""
    if name != "index":
        return

    def from_here(link):
        text, place = link.groups()
        inside = place.startswith("docs/")
        if place.endswith(".md") and not inside:  # It has no page on the site.
            return text
        return f"[{text}]({place.removeprefix('docs/') if inside else '../' + place})"

    readme = (DOCS.parent / "README.md").read_text()
    source[0] = re.sub(r"\[([^]]*)\]\((?!#|\w+:)([^)]+)\)", from_here, readme) + "\n" + source[0]


def keep_examples(*event):
    """Marks indented blocks of docstrings as code."""
    lines = event[-1]
    for number in range(len(lines) - 1, 0, -1):
        if lines[number].startswith("    ") and not lines[number - 1].strip():
            lines[number:number] = ["::", ""]
