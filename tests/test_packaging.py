"""The built package: its recipes, its dependencies, and what a source distribution holds."""

import configparser
import subprocess
from pathlib import Path

import pytest

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
    assert "vit-jax[train,text,export,onnx,hub,docs]" in extras["test"]


def test_a_source_distribution_holds_what_git_holds():
    if not (ROOT / ".git").exists():
        pytest.skip("this is no checkout, so that there is nothing to compare with")
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    tops = {name.split("/")[0] for name in done.stdout.splitlines()}
    listed = set((ROOT / "MANIFEST.in").read_text().split())
    assert tops - listed - {".github", ".gitignore", "MANIFEST.in"} == set()


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
