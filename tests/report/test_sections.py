"""Sections of the report are kept with their pictures, and shown."""

import ast
import json
import tempfile
from pathlib import Path

import pytest
from drawn import ODD_VALUES, a_figure
from hypothesis import given, settings
from hypothesis import strategies as st
from pages import Page
from PIL import Image

import vit_jax
from vit_jax.errors import UserError
from vit_jax.report import Section, figures, save_sections, write_report
from vit_jax.report.html import render
from vit_jax.report.sections import read_sections


@settings(max_examples=20, deadline=None)
@given(st.lists(ODD_VALUES | st.fixed_dictionaries(
    {"title": st.text(max_size=5)},
    optional={
        key: ODD_VALUES
        for key in (
            "text", "image", "drawing", "table", "width", "is_pixel_art", "alt", "numbers",
        )
    },
)))  # fmt: skip
def test_an_odd_index_of_sections_never_ends_the_report(entries):
    with tempfile.TemporaryDirectory() as workdir:
        folder = Path(workdir) / "report"
        folder.mkdir()
        (folder / "sections.json").write_text(json.dumps({"sections": entries}))
        try:
            sections = read_sections(workdir)
        except UserError:
            return
        Page(render("run", {}, [], sections, is_done=False))


def test_an_index_names_no_files_elsewhere(tmp_path):
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "report").mkdir()
    entries = [{"title": "x", "image": "../secret"}, {"title": "y", "drawing": "/etc/passwd"}]
    (tmp_path / "report" / "sections.json").write_text(json.dumps({"sections": entries}))
    assert [(s.image, s.drawing) for s in read_sections(tmp_path)] == [(None, None)] * 2


def test_a_picture_that_fails_costs_that_picture_alone(tmp_path, caplog):
    broken = a_figure()
    broken.axes[0].set_title("$x^$")  # A formula that matplotlib cannot read.
    save_sections(
        tmp_path, [Section("Broken", "Its text.", broken), Section("Whole", "", a_figure())]
    )
    first, second = read_sections(tmp_path)
    assert (first.text, first.image, first.drawing) == ("Its text.", None, None)
    assert second.image
    assert second.drawing
    (record,) = caplog.records
    assert "'Broken'" in record.getMessage()
    assert "\n" not in record.getMessage()


def test_saving_a_section_again_replaces_it_in_place(tmp_path):
    save_sections(tmp_path, [Section("One", "old"), Section("Two", "two")])
    save_sections(tmp_path, [Section("Three", "three"), Section("One", "new")])
    stored = [(section.title, section.text) for section in read_sections(tmp_path)]
    assert stored == [("One", "new"), ("Two", "two"), ("Three", "three")]


def test_a_section_takes_figures_pil_images_and_bytes(tmp_path):
    small = Image.new("RGB", (8, 6), "red")
    small.save(tmp_path / "red.png")
    save_sections(
        tmp_path,
        [
            Section("Figure", image=a_figure()),
            Section("Small image", image=small),
            Section("Bytes", image=(tmp_path / "red.png").read_bytes()),
        ],
    )
    figure, image, raw = read_sections(tmp_path)
    assert b"<svg" in figure.drawing
    assert figure.image.startswith(b"\x89PNG")
    assert (image.is_pixel_art, image.width) == (True, 240)
    assert image.image == raw.image
    assert image.drawing is None


def test_titles_of_the_same_words_keep_their_own_pictures(tmp_path):
    titles = [
        "Maps: a/b",
        "maps a b!",
        "Maps a b",
        "maps a b",
        "Maps A B",
        "\udc80",
        "\udc81",
        "!",
        "",
    ]
    pictures = [Image.new("RGB", (4, 4), (20 * n, 0, 0)) for n in range(len(titles))]
    save_sections(tmp_path, [Section(t, image=p) for t, p in zip(titles, pictures, strict=True)])
    found = read_sections(tmp_path)
    assert [section.title for section in found] == titles
    assert len({section.image for section in found}) == len(titles)
    assert (tmp_path / "report" / "maps_a_b.png").is_file()


@pytest.mark.parametrize(("width", "is_broad"), [(7.0, False), (7.1, True)])
def test_a_picture_that_scrolls_on_a_phone_says_so(tmp_path, width, is_broad):
    broad = figures.new_figure(width, 2)
    save_sections(tmp_path, [Section("Broad", image=broad, alt="Nothing.")])
    assert ("scrolls sideways" in write_report(tmp_path).read_text()) == is_broad


def test_every_section_of_the_package_has_its_picture_in_words():
    checked, package = 0, Path(vit_jax.__file__).parent
    for path in package.rglob("*.py"):
        for call in ast.walk(ast.parse(path.read_text())):
            if isinstance(call, ast.Call) and ast.unparse(call.func) == "Section":
                keys = [one.arg for one in call.keywords]
                if len(call.args) > 2 or "image" in keys:
                    assert "alt" in keys, f"{path}:{call.lineno}"
                    checked += 1
    assert checked > 10
