"""The wheel, alone in an environment and an empty folder: from photos to a program without us."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

TEN_LINES = """
import vit_jax
model = vit_jax.build("vit", num_classes=5, patch_size=8, width=16, depth=1, num_heads=2)
params = model.init(jax.random.key(0), np.zeros((1, 32, 32, 3), np.float32))["params"]
vit_jax.checkpoints.save(params, model, "released.npz", "npz")
config = vit_jax.config.load("folder:photos,checkpoint=released.npz,size=32")
config.total, config.batch_size, config.optim.schedule.warmup = 4, 8, 1
outcome = vit_jax.train(config, "run")
predictor = vit_jax.Predictor.from_workdir("run")
probability = predictor.predict(["photos/cold/0.png"])["probability"]
done = vit_jax.export(predictor, "served", "stablehlo", batch=1, include_preprocessing=True)
"""

FINE_TUNE = f"""
import jax
import numpy as np
from PIL import Image
from pathlib import Path
for name, color in (("cold", 40), ("warm", 200)):
    Path("photos", name).mkdir(parents=True)
    for n in range(10):
        Image.new("RGB", (40, 40), (color, 90, n)).save(f"photos/{{name}}/{{n}}.png")
{TEN_LINES}
assert "site" in vit_jax.__file__ and Path("run/report.html").exists(), vit_jax.__file__
np.save("expected.npy", probability)
"""

SERVE = """
import importlib.util, os, re
import numpy as np
assert importlib.util.find_spec("vit_jax") is None
expected = np.load("expected.npy")
os.chdir("served")
names = {"images": np.full((1, 32, 32, 3), (40, 90, 0), np.uint8)}
exec(re.search("```python\\n(.*?)```", open("README.md").read(), re.DOTALL)[1], names)
np.testing.assert_allclose(names["outputs"]["probability"], expected, atol=1e-5)
"""


@pytest.mark.slow
def test_a_wheel_fine_tunes_predicts_and_exports_what_runs_without_it(tmp_path):
    source, site, folder = tmp_path / "source", tmp_path / "site", tmp_path / "empty"
    folder.mkdir()
    for name in ("vit_jax", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "-q"]
    subprocess.run([*pip, "-w", str(tmp_path)], cwd=source, check=True, timeout=300)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        file.extractall(site)
    # An environment with the dependencies of this one and without this checkout, whose `.pth` file
    # only a site directory obeys.
    venv.create(tmp_path / "venv", symlinks=True)
    own = next((tmp_path / "venv/lib").glob("python*/site-packages"))
    (own / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    python = tmp_path / "venv/bin/python"
    flags = [x for x in os.environ["XLA_FLAGS"].split() if "device_count" not in x]
    kept = {**os.environ, "XLA_FLAGS": " ".join(flags)}
    for code, path in ((FINE_TUNE, str(site)), (SERVE, "")):
        done = subprocess.run(
            [python, "-c", code],
            cwd=folder,
            env={**kept, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            timeout=500,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
