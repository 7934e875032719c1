"""Measuring the input in turns with other loaders."""

import pytest

from vit_jax.__main__ import main
from vit_jax.bench import input as bench
from vit_jax.config import load
from vit_jax.data.stored import Form
from vit_jax.errors import UserError


def load_local(request):
    return load(f"{request.config.rootpath}/configs/vit_s16_i1k.py:runlocal")


class Other:
    def __init__(self, seconds):
        self._seconds = iter(seconds)

    def seconds(self, batches):
        return next(self._seconds)

    def close(self):
        pass


def test_it_takes_turns(request, monkeypatch):
    rates = iter([900.0, 100.0, 900.0])
    monkeypatch.setattr(bench, "bench_input", lambda *_: {"images_per_sec": next(rates)})
    monkeypatch.setattr(bench.Rival, "of_input", lambda *_: Other([2.0, 2.0, 1.0]))
    monkeypatch.setattr(bench.os, "sched_getaffinity", lambda _: {0, 1})
    found = bench.bench_against(load_local(request), "timm", batches=10)
    # Theirs: 80 images in 2, 2, 1 s.
    assert found["images_per_sec_per_core"] == 450
    assert found["timm_images_per_sec_per_core"] == 20
    assert found["timm_ratio"] == 11.25


def test_original_and_stored_files_take_turns(request, monkeypatch):
    asked = []

    def ours(config, batches):
        asked.append(config.data.args.get("stored", ""))
        return {"images_per_sec": 800.0 if asked[-1] else 400.0}

    monkeypatch.setattr(bench, "bench_input", ours)
    monkeypatch.setattr(
        bench.Rival,
        "of_input",
        lambda _, folder, *__: Other([0.4] if folder.endswith("stored") else [0.8]),
    )
    monkeypatch.setattr(bench.os, "sched_getaffinity", lambda _: {0, 1})
    form = Form.parse("q90,max_side=512")
    found = bench.bench_against(load_local(request), "timm", form, batches=10, rounds=1)
    assert asked == ["", "q90,max_side=512"]
    # Theirs: 80 images in 0.8 and 0.4 s.
    ratios = {name: value for name, value in found.items() if "ratio" in name}
    assert ratios == {"timm_ratio": 4, "timm_ratio_stored": 4, "timm_ratio_ours_stored": 8}
    assert found["images_per_sec_per_core_stored"] == 400
    assert found["stored_bytes_after"] < found["stored_bytes_before"] / 1.5
    assert found["stored_psnr"] > 38


def test_stored_versions_of_sources(request):
    config, form = load_local(request), Form(90)
    with pytest.raises(UserError, match=r"compare it on stored images, with\s+--stored"):
        bench.bench_against(config, "ffcv")
    config.data.update(source="tfds", name="imagenet2012:5.1.0")
    assert bench.stored_config(config, form).data.name == "imagenet2012_q90:5.1.0"
    config.data.source = "folder"
    with pytest.raises(UserError, match="'folder' has no stored version"):
        bench.stored_config(config, form)


@pytest.mark.soak  # `tests/benchmarks` reads them without a process of their own.
def test_plain_tfrecords_in_a_process_of_their_own(request):
    config = load_local(request)
    found = bench.bench_against(config, "tfrecord", batches=2, rounds=1)
    assert found["tfrecord_ratio"] > 0
    config.data.args.encoded = False
    with pytest.raises(UserError, match="needs encoded images"):
        bench.bench_against(config, "tfrecord")


def test_without_a_checkout_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("vit_jax.bench.rivals.SCRIPTS", tmp_path)
    with pytest.raises(UserError, match="needs a checkout of this project"):
        bench.Rival.of_input("timm", "folder", "pp", 8)


def test_a_rival_that_ends_is_told(tmp_path, monkeypatch):
    (tmp_path / "timm_loader.py").write_text("import sys; sys.exit(1)")
    monkeypatch.setattr("vit_jax.bench.rivals.SCRIPTS", tmp_path)
    with pytest.raises(RuntimeError, match="the process of timm ended"):
        bench.Rival.of_input("timm", "folder", "pp", 8)


def test_against_goes_with_input_alone(request, capsys):
    config = f"--config={request.config.rootpath}/configs/vit_s16_i1k.py:runlocal"
    assert main(["bench", "step", config, "--against=timm"]) == 2
    assert "goes with `bench input`" in capsys.readouterr().err
