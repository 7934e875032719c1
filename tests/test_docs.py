"""The pages agree with the tree: links lead somewhere, and files that are named exist."""

import inspect
import pydoc
import re
from pathlib import Path

import pytest

import vit_jax
import vit_jax.errors

ROOT = Path(__file__).parents[1]
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [*sorted(ROOT.glob("*.md")), *DOCS]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = page.read_text()
    anchors = {
        re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        for heading in re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    }
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        if not path:
            assert anchor in anchors, target
        elif "://" not in path:
            assert (page.parent / path).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_are_named_exist(page):
    named = re.findall(
        r"`((?:vit_jax|configs|tests|scripts|benchmarks)/[\w/.]*)`", page.read_text()
    )
    assert [name for name in named if not (ROOT / name).exists() and "NAME" not in name] == []


def test_the_page_on_python_has_what_is_there():
    text = (ROOT / "docs/api.md").read_text()
    listed = re.findall(r"\.\. auto(?:function|class|module):: (\S+)", text)
    found = {name: pydoc.locate(name) for name in listed}
    assert [name for name, one in found.items() if one is None or not inspect.getdoc(one)] == []
    offered = {f"vit_jax.{name}" for name in vit_jax.__all__ if not name.startswith("__")}
    modules = {name for name in offered if inspect.ismodule(pydoc.locate(name))}
    assert offered - modules - {*listed} == set()
    errors = re.search(r"vit_jax\.errors\n +:members: (.*)", text)[1].split(", ")
    assert {*errors} == {
        name for name, one in vars(vit_jax.errors).items() if inspect.isclass(one)
        and issubclass(one, Exception)
    }  # fmt: skip


@pytest.mark.parametrize(
    "room", ["attention", "checkpoints", "config", "data", "models", "optim", "report", "tasks"]
)
def test_public_functions_tell_that_they_raise(room):
    module = getattr(vit_jax, room)
    offered = (getattr(module, name) for name in getattr(module, "__all__", dir(module)))
    functions = [one for one in offered if inspect.isfunction(one)]
    raising = [one for one in functions if "raise UserError(" in inspect.getsource(one)]
    assert [one.__name__ for one in raising if "aises" not in inspect.getdoc(one)] == []


def test_every_page_is_reached_from_the_readme():
    readme = (ROOT / "README.md").read_text()
    pages = [page.name for page in DOCS if page.name != "index.md"]  # Which is the README.
    assert [name for name in pages if f"docs/{name}" not in readme] == []


def test_every_room_is_on_the_map():
    readme = (ROOT / "README.md").read_text()
    rooms = {path.parent.name for path in (ROOT / "vit_jax").glob("*/__init__.py")}
    assert {room for room in rooms if f"`vit_jax/{room}/`" not in readme} - {"cli"} == set()
