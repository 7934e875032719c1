"""The built package: its recipes, its dependencies, and what a source distribution holds."""

import configparser
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from setuptools.command.egg_info import FileList

from vit_jax import config as config_lib
from vit_jax import version
from vit_jax.__main__ import main
from vit_jax.cli import parser
from vit_jax.config import loading
from vit_jax.errors import UserError

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def declared():
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    return settings


def test_a_recipe_is_named_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    by_name = config_lib.load("vit_s16_i1k:300")
    assert by_name.to_dict() == config_lib.load("configs/vit_s16_i1k.py:300").to_dict()
    assert by_name.to_dict() == config_lib.load(f"{ROOT}/configs/vit_s16_i1k.py:300").to_dict()
    with pytest.raises(UserError, match="no such file or recipe; did you mean 'vit_s16_i1k'"):
        config_lib.load("vit_s16_ik")


def test_a_file_goes_before_the_recipe_of_its_name(tmp_path, monkeypatch):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/digits.py").write_text(
        "from vit_jax.config import default_config\n"
        "def get_config(arg):\n"
        "    config = default_config()\n"
        "    config.model.name, config.seed = 'vit_s16', 7\n"
        "    return config\n"
    )
    monkeypatch.chdir(tmp_path)
    assert config_lib.load("configs/digits.py").seed == 7
    assert config_lib.load("digits").seed == 0


def test_an_installed_package_has_its_recipes_inside(tmp_path, monkeypatch):
    (tmp_path / "vit_jax/configs").mkdir(parents=True)
    (tmp_path / "vit_jax/configs/own.py").touch()
    monkeypatch.setattr(loading, "__file__", str(tmp_path / "vit_jax/config/loading.py"))
    assert loading.recipes() == {"own": tmp_path / "vit_jax/configs/own.py"}


def test_an_installed_package_inside_another_checkout_has_no_commit(monkeypatch):
    monkeypatch.setattr(version, "__file__", str(ROOT / "docs/figures/vit_jax/version.py"))
    assert version.current_commit() is None


def test_models_and_checkpoints_install_without_tensorflow(declared):
    base = declared["options"]["install_requires"]
    extras = declared["options.extras_require"]
    for name in ("tensorflow", "numba", "scikit-learn", "tokenizers", "jinja2"):
        assert name not in base
        assert any(name in extras[extra] for extra in ("train", "text"))
    assert "vit-jax[train,text,export,onnx,hub,docs,notebooks]" in extras["test"]


def test_what_the_suite_installs_is_pinned(declared):
    extras = declared["options.extras_require"]
    named = re.search(r"vit-jax\[(.+)\]", extras["test"])[1].split(",")
    lines = [declared["options"]["install_requires"], *(extras[name] for name in [*named, "test"])]
    wanted = {canonicalize_name(Requirement(x).name) for x in "\n".join(lines).split("\n") if x}
    pins = [x for x in (ROOT / "constraints.txt").read_text().splitlines() if "==" in x]
    pinned = {canonicalize_name(Requirement(x).name) for x in pins}
    assert wanted - pinned == {"vit-jax"}


def installed_with(requirements):
    """The distributions that these requirements bring, by their normalized names."""
    todo, done = [Requirement(line) for line in requirements], set()
    while todo:
        one = todo.pop()
        known = (canonicalize_name(one.name), frozenset(one.extras))
        if known not in done:
            done.add(known)
            more = map(Requirement, metadata.distribution(one.name).requires or ())
            chosen = [{"extra": extra} for extra in ("", *one.extras)]
            todo += [
                each for each in more
                if not each.marker or any(map(each.marker.evaluate, chosen))
            ]  # fmt: skip
    return {name for name, _ in done}


WITHOUT_EXTRAS = """
import importlib.abc, sys
blocked = set(sys.argv[1:])

class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in blocked:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
import vit_jax
import vit_jax.cli.parser, vit_jax.inference.convert, vit_jax.inference.exports.stablehlo
print(vit_jax.Predictor, vit_jax.features, vit_jax.export, vit_jax.attention_maps)
print(vit_jax.build("vit_ti16", num_classes=10))
"""


def test_what_needs_no_extra_needs_the_declared_packages_alone(declared):
    """A process in which no package can be imported that `install_requires` does not bring."""
    there = installed_with(declared["options"]["install_requires"].split())
    blocked = [
        module
        for module, owners in metadata.packages_distributions().items()
        if not there & {canonicalize_name(owner) for owner in owners} and module != "vit_jax"
    ]
    assert {"tensorflow", "jinja2", "sklearn"} <= {*blocked}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_EXTRAS, *blocked],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_source_distribution_holds_what_git_holds(monkeypatch):
    if not (ROOT / ".git").exists():
        pytest.skip("this is no checkout, so that there is nothing to compare with")
    monkeypatch.chdir(ROOT)
    packed = FileList()
    for line in Path("MANIFEST.in").read_text().splitlines():
        if not line.startswith("#"):
            packed.process_template_line(line)
    done = subprocess.run(["git", "ls-files"], capture_output=True, text=True, check=True)
    left_out = {*done.stdout.splitlines()} - {*packed.files}
    assert left_out == {".github/workflows/ci.yml", ".gitignore", "MANIFEST.in"}


@pytest.fixture(scope="module")
def build():
    """The functions of setup.py."""
    spec = importlib.util.spec_from_file_location("build", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("repository", ["", "https://example.org/us/vit"])
def test_the_readme_on_an_index_has_no_links_to_files_beside_it(
    repository, build, tmp_path, monkeypatch
):
    (tmp_path / "setup.cfg").write_text(
        f"[metadata]\nproject_urls =\n  Issues = https://i\n  Repository = {repository}\n"
    )
    with monkeypatch.context() as patch:
        patch.setattr(build, "ROOT", tmp_path)
        assert build.repository() == repository
    places = re.findall(r"\]\(([^)]+)\)", build.readme(repository))
    assert [place for place in places if not place.startswith(("#", "https://"))] == []
    assert (f"{repository}/raw/HEAD/docs/report.png" in places) == bool(repository)


def dockerfile():
    """Returns the instructions of the Dockerfile, as pairs of a keyword and what follows it."""
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    text = "\n".join(line for line in lines if not line.startswith("#"))
    return [line.split(maxsplit=1) for line in text.replace("\\\n", " ").splitlines()]


def test_the_dockerfile_names_what_is_there(declared):
    named = dict(dockerfile())
    pages = (ROOT / "Dockerfile").read_text() + (ROOT / "docs/launching.md").read_text()
    built = {extra for one in re.findall(r"\btrain(?:,\w+)+", pages) for extra in one.split(",")}
    assert {"tpu", "cuda"} <= built <= set(declared["options.extras_require"])
    python = named["FROM"].removeprefix("python:").removesuffix("-slim")
    assert f"Python :: {python}" in declared["metadata"]["classifiers"]
    scripts = declared["options.entry_points"]["console_scripts"]
    assert f"{json.loads(named['ENTRYPOINT'])[0]} = " in scripts
    assert [
        name for name in re.findall(r"\w+\.txt", named["RUN"]) if not (ROOT / name).exists()
    ] == []
    hadolint = Path(sys.executable).with_name("hadolint")
    if hadolint.exists() or (sys.platform, platform.machine()) == ("linux", "x86_64"):
        subprocess.run([hadolint, ROOT / "Dockerfile"], check=True)


@pytest.mark.soak
def test_the_dockerfile_installs_from_the_source_distribution(tmp_path):
    """Runs its commands in a clean environment, in the folder that the archive unpacks to."""
    build = "from setuptools.build_meta import build_sdist; print(build_sdist({!r}))"
    subprocess.run([sys.executable, "-c", build.format(str(tmp_path))], cwd=ROOT, check=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    shutil.unpack_archive(archive, tmp_path, filter="data")
    (folder,) = tmp_path.glob("vit?jax-*/")
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    environment = {"PATH": f"{tmp_path}/venv/bin:{os.environ['PATH']}", "HOME": str(tmp_path)}
    environment |= {name: os.environ[name] for name in os.environ if name.startswith("PIP_")}
    for keyword, value in dockerfile():
        if keyword == "ARG":
            name, _, default = value.partition("=")
            environment[name] = default or "0123abc"
        elif keyword == "RUN":
            subprocess.run(["sh", "-c", value], cwd=folder, env=environment, check=True)
    parts = dict(dockerfile())
    command = [*json.loads(parts["ENTRYPOINT"]), *json.loads(parts["CMD"])]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True
    )
    assert "train" in done.stdout
    code = "import tensorflow; from vit_jax import version; print(version.current_commit())"
    done = subprocess.run(
        ["python", "-c", code], cwd=tmp_path, env=environment, check=True,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout.strip() == "0123abc"


@pytest.mark.parametrize(
    ("module", "extra"), [("jax", "train"), ("tokenizers", "text"), ("tensorflow.io", "train")]
)
def test_a_package_that_is_not_installed_is_one_line(module, extra, monkeypatch, capsys):
    def run(_):
        raise ModuleNotFoundError(f"No module named {module!r}", name=module)

    monkeypatch.setattr(parser, "run", run)
    assert main(["models"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"error: {module.split('.')[0]} is not installed for ")
    assert line.endswith(f"install the extra {extra!r} of vit-jax")


def test_a_module_of_ours_that_is_missing_is_an_error_of_ours(monkeypatch):
    def run(_):
        raise ModuleNotFoundError("No module named 'vit_jax.gone'", name="vit_jax.gone")

    monkeypatch.setattr(parser, "run", run)
    with pytest.raises(ModuleNotFoundError):
        main(["models"])
