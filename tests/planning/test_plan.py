"""`plan` prints, writes and returns what a run needs, and searches for what fits."""

import dataclasses
import json
import math
import pickle
import re
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest
from jax.experimental import serialize_executable
from ml_collections import ConfigDict

from vit_jax import config as config_lib
from vit_jax import data, models
from vit_jax.__main__ import main
from vit_jax.parallel import accelerators, sharding
from vit_jax.planning import command, fit
from vit_jax.planning import plan as plan_lib
from vit_jax.planning.plan import Memory, Plan
from vit_jax.planning.table import table
from vit_jax.planning.target import Target
from vit_jax.training.run import Run

TINY = Path(__file__).parent.parent / "tiny.py"
GIB = accelerators.GIB


@pytest.fixture(scope="module")
def planned(tmp_path_factory, digits_npz):
    """The command on a tiny run for 8 virtual CPUs: (exit code, standard output, JSON, program)."""
    folder = tmp_path_factory.mktemp("plan")
    argv = [
        "plan", f"--config={TINY}:npz={digits_npz},full=True", "--topology=cpu:8", "--placements",
        "--config.mesh.fsdp=2", f"--json={folder / 'plan.json'}", f"--save={folder / 'step'}",
    ]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        lines = []
        patch.setattr("builtins.print", lambda *args, **_: lines.extend(map(str, args)))
        code = main(argv)
    return code, "\n".join(lines), json.loads((folder / "plan.json").read_text()), folder / "step"


def test_table_and_exit_code(planned):
    code, text, _, _ = planned
    assert code == 0
    for row in (
        "% beside computation",
        " times that (with what is computed again, the optimizer's)",
        "mesh               data 4 × fsdp 2 × tensor 1",
        "settings           remat none, accum_steps 2, zero1 False",
        "steps              12 (192 images)",
    ):
        assert row in text
    assert re.search(r"backbone/blocks/mlp/dense1/kernel +2×16×64 +- fsdp - +4,096", text)
    for name in ("parameters", "optimizer state", "gradients", "activations", "batch", "FLOPs"):
        assert f"{name} " in text


def test_json_adds_up(planned):
    _, _, found, _ = planned
    memory = found["memory"]
    assert found["used_bytes"] == sum(memory.values())
    whole = 4 * found["num_params"]
    assert whole / 2 <= memory["parameters"] < 0.7 * whole  # Kernels are halved, small rest not.
    assert memory["average"] == memory["parameters"]
    assert memory["optimizer"] == pytest.approx(2 * memory["parameters"], abs=16)
    assert memory["batch"] == 16 * (8 * 8 + 4) // 8
    assert found["ici_bytes"] > 0
    assert found["dcn_bytes"] == 0
    states = ("parameters", "average", "optimizer")
    assert found["save_bytes"] >= sum(memory[name] for name in states)
    assert found["flops"] % 48 == 0  # 3 × 16 examples × a whole number


def test_products_that_are_computed_again_count(tiny_config):
    def computed(remat):
        traced = Run.build(tiny_config(model__remat=remat)).trace_step()
        return models.product_flops(traced.jaxpr)

    once = computed("none")
    assert computed("dots_saveable") == once
    assert once < computed("full") < 4 / 3 * once


def test_saved_program_runs_here(planned):
    payload = pickle.loads(planned[3].read_bytes())
    assert callable(serialize_executable.deserialize_and_load(*payload))


def made_up(remat="none", accum=1, mesh=(8, 1, 1), zero1=False, activations=20 * GIB, **fields):
    memory = Memory(2 * GIB, 0, 4 * GIB, 0, 2 * GIB, activations, 0)
    plan = Plan(
        topology="v5e:2x4",
        num_slices=1,
        num_devices=8,
        num_chips=8,
        mesh=dict(zip(("data", "fsdp", "tensor"), mesh, strict=True)),
        settings={"remat": remat, "accum_steps": accum, "zero1": zero1},
        batch_size=64,
        num_params=10**9,
        total_steps=1000,
        total_images=64_000,
        memory=memory,
        hbm_bytes=16 * GIB,
        used_bytes=memory.total,
        fits=memory.total <= 16 * GIB,
        flops=8 * 197 * 10**12,
        flops_per_device=197e12,
        compile_seconds=1.0,
        bounds={"compute": 1.0, "memory": 0.5},
    )
    return dataclasses.replace(plan, **fields)


@pytest.mark.parametrize(
    ("name", "slices", "mesh", "zero1", "expected"),
    [
        ("v5e:4x4", 1, (1, 16, 1), False, (4, 4, 1)),
        ("v5e:4x4", 2, (2, 16, 1), False, (8, 4, 1)),
        ("v5p:4x8x8", 1, (1, 64, 4), False, (4, 16, 4)),
        ("v5e:4x4", 1, (16, 1, 1), True, (4, 4, 1)),
        ("v5e:4x4", 2, (8, 4, 1), True, (8, 4, 1)),
        ("v5e:4x4", 1, (2, 8, 1), False, None),  # A part of the slice already.
        ("v5e:4x4", 1, (16, 1, 1), False, None),
        ("v5e:4x4", 1, (1, 1, 16), False, None),
        ("v5e:4x4", 1, (1, 2, 8), False, None),  # Fewer than a side has.
    ],
)
def test_mesh_that_sends_less(name, slices, mesh, zero1, expected):
    sides = tuple(int(side) for side in name.partition(":")[2].split("x"))
    num_devices = math.prod(sides) * slices
    plan = made_up(mesh=mesh, zero1=zero1, sides=sides, num_slices=slices, num_devices=num_devices)
    axes = ("data", "fsdp", "tensor", "zero1")
    wanted = expected and dict(zip(axes, (*expected, False), strict=True))
    assert plan.layout.on_part_of_slice() == wanted


def test_whole_kernels_that_are_sent_are_told_with_what_to_write():
    plan = made_up(mesh=(1, 16, 1), hbm_traffic=1, ici_bytes=1.0)
    told = "--config.mesh.data=4 --config.mesh.fsdp=4"
    assert told not in table(plan)
    assert told in table(dataclasses.replace(plan, mesh_that_sends_less={"data": 4, "fsdp": 4}))


def test_a_save_is_held_against_the_notice_of_spot():
    plan = made_up(num_hosts=2, save_bytes=8 * GIB)
    told = (
        "8.00 GiB (4.00 GiB from each of 2 hosts): 42.9 s at 100 MB/s a host (--write-rate), LONG"
    )
    assert told in table(plan)
    assert ": 4.3 s at 1000 MB/s a host (--write-rate), within the 30 s" in table(
        plan, write_rate=1000
    )
    assert "a save" not in table(made_up())


def test_search_splits_over_a_part_of_a_slice_before_the_whole(vit_config):
    plan = made_up(mesh=(16, 1, 1), sides=(4, 4), num_devices=16)
    fastest = sorted(fit.candidates(vit_config, plan), key=lambda c: c.time)
    split = [dict(c.mesh)["fsdp"] for c in fastest if not dict(c.mesh)["zero1"]]
    assert split[:3] == [1, 4, 16]


def test_time_and_chip_hours():
    plan = made_up()
    assert (plan.least_seconds, plan.bound_by) == (1.0, "compute")
    assert plan.seconds_at(0.5) == 2.0
    assert plan.as_json()["at_mfu"]["50%"]["chip_hours"] == pytest.approx(2 * 1000 * 8 / 3600)
    halves = made_up(num_chips=4)  # Of two devices each.
    assert halves.as_json()["at_mfu"]["50%"]["chip_hours"] == pytest.approx(2 * 1000 * 4 / 3600)


SENDS = """HloModule step, num_partitions=8

ENTRY %main (x: f32[128]) -> f32[1024] {
  %x = f32[128]{0} parameter(0)
  %g = f32[1024]{0} all-gather(%x), channel_id=1, dimensions={0}
  %s = (f32[128]{0:S(1)}, u32[]{:S(2)}, token[]) send(%x, %t), frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}
  ROOT %f = f32[1024]{0} fusion(%g), kind=kLoop, calls=%square
}
"""  # noqa: E501 (HLO is written in long lines)


def test_the_least_times_of_a_step_by_hand():
    """The two devices of each chip share its memory, links and network."""
    chip = dataclasses.replace(
        accelerators.CHIPS["v5e"], devices=2, flops=1000.0, hbm_bandwidth=4096.0,
        link_bandwidth=3584.0, dcn_bandwidth=512.0,
    )  # fmt: skip
    target = Target("made:up", [None] * 8, 2, chip)
    program = SimpleNamespace(as_text=lambda: SENDS)
    found = plan_lib._with_traffic(made_up(flops=8 * 1500, num_slices=2), target, program)
    # The gathered array and that of the fusion are written, and read.
    assert found.hbm_traffic == 2 * (4096 + 4096)
    assert (found.ici_bytes, found.dcn_bytes) == (4096 * 7 / 8, 2 * 512 / 2)
    assert found.bounds == {
        "compute": 1500 / 500,
        "memory": 16384 / 2048,
        "links": 3584 / (3584 / 4),
        "network": 512 / 256,
    }


@pytest.fixture
def vit_config():
    config = config_lib.default_config()
    config.batch_size = 64
    return config_lib.validate(config)


def test_search_compiles_the_fastest_first_and_stops_at_what_fits(vit_config, monkeypatch):
    compiled = []

    def compile_instead(config, target):
        """Memory as it is on the chip: accumulation divides activations, remat by a third."""
        remat = config.model.get("remat", "none")
        compiled.append((remat, config.accum_steps))
        share = {"none": 1, "dots_saveable": 0.8, "full": 0.1}.get(remat, 0.5)
        found = made_up(
            remat,
            config.accum_steps,
            tuple(config.mesh[axis] for axis in ("data", "fsdp", "tensor")),
            config.mesh.zero1,
            int(20 * GIB * share / config.accum_steps),
        )
        return found, []

    monkeypatch.setattr(fit, "make_plan", compile_instead)
    said = []
    found = fit.fit(vit_config, None, made_up(), said.append)
    assert found.plan.fits
    assert found.tried == len(compiled) == len(said) >= 1
    assert "fits" in said[-1]
    changed = plan_lib.with_overrides(vit_config, found.overrides)
    again, _ = compile_instead(changed, None)
    assert again.used_bytes == found.plan.used_bytes


def test_advice_by_hand(vit_config):
    """The 28 GiB are 20 of activations, 2 of parameters, and 6 that zero1 splits over 8 devices."""
    assert fit.advice(vit_config, made_up()) == [
        "--config.model.remat=dots_saveable (about 15.8 GiB)",  # 20 · 3.8 / 9.7 + 8
        "--config.accum_steps=2 --config.mesh.zero1=True (about 12.8 GiB)",  # 20 / 2 + 2 + 6 / 8
        "--config.model.remat=dots_with_no_batch_dims_saveable (about 13.4 GiB)",  # · 2.6 / 9.7
    ]


def test_nothing_fits(vit_config, monkeypatch):
    huge = made_up(hbm_bytes=GIB // 2)
    monkeypatch.setattr(fit, "make_plan", lambda config, target: (huge, []))
    assert not fit.fit(vit_config, None, huge).plan.fits
    assert fit.advice(vit_config, huge) == []


@pytest.fixture
def v5e(monkeypatch):
    """Every target is eight chips of a v5e."""
    target = Target("v5e:2x4", jax.devices(), 1, accelerators.CHIPS["v5e"])
    monkeypatch.setattr(Target, "find", lambda *args: target)


@pytest.mark.usefixtures("v5e")
def test_does_not_fit_is_exit_code_3_with_the_shortfall_and_advice(
    vit_config, monkeypatch, capsys, tmp_path
):
    stage = plan_lib.StagePlan("", "", vit_config, made_up(), [])
    monkeypatch.setattr(command, "plan_stages", lambda *args, **kwargs: [stage])
    monkeypatch.setattr(config_lib, "load", lambda *args: vit_config)
    file = tmp_path / "plan.json"
    assert main(["plan", "--config=any.py", f"--json={file}"]) == 3
    told = capsys.readouterr()
    assert "28.00 GiB of 16.00 GiB: DOES NOT FIT" in told.out
    assert "--config.model.remat=dots_with_no_batch_dims_saveable (about 13.4 GiB)" in told.out
    assert told.err.strip().endswith(
        "needs 28.00 GiB of each device's 16.00 GiB, 12.00 GiB too much"
    )
    assert json.loads(file.read_text())["fits"] is False


@pytest.mark.usefixtures("v5e")
def test_the_search_names_the_keys_of_the_stage_and_its_steps(
    vit_config, monkeypatch, capsys, tmp_path
):
    low = plan_lib.StagePlan("low", "stage low", vit_config, made_up().of_steps(4), [])
    last = plan_lib.StagePlan("", "last stage", vit_config, made_up(activations=GIB), [])

    def plan_instead(config, target, save=None, but=None):
        return [stage for stage in (low, last) if stage.name != but]

    monkeypatch.setattr(command, "plan_stages", plan_instead)
    config = ConfigDict(vit_config.to_dict() | {"stages": {"low": {"until": 4, "accum_steps": 1}}})
    monkeypatch.setattr(config_lib, "load", lambda *args: config)

    assert main(["plan", "--config=any.py"]) == 3
    told = capsys.readouterr()
    assert "these would fit in stage low, the fastest first" in told.out
    assert "--config.stages.low.accum_steps=2 --config.mesh.zero1=True (about" in told.out
    assert "does not fit: a step in stage low needs 28.00 GiB" in told.err

    def compile_instead(config, target):
        size = GIB if config.accum_steps > 1 else 20 * GIB
        settings = made_up().settings | {"accum_steps": config.accum_steps}
        return dataclasses.replace(made_up(activations=size), settings=settings), []

    monkeypatch.setattr(fit, "make_plan", compile_instead)
    file = tmp_path / "plan.json"
    assert main(["plan", "--config=any.py", "--fit", f"--json={file}"]) == 0
    assert "write: --config.stages.low.accum_steps=" in capsys.readouterr().out
    found = json.loads(file.read_text())
    assert found["total_steps"] == 4
    assert "stages.low.accum_steps" in found["overrides"]

    # What was found may be enough for the other stage, too, or not.
    small, huge = low._replace(plan=last.plan), last._replace(plan=made_up(activations=18 * GIB))
    for found, status in (([small, last], 0), ([small, huge], 3)):

        def plan_both(config, target, save=None, but=None, found=found):
            stages = found if config.stages.low.accum_steps > 1 else [low, huge]
            return [stage for stage in stages if stage.name != but]

        monkeypatch.setattr(command, "plan_stages", plan_both)
        assert main(["plan", "--config=any.py", "--fit"]) == status
    assert "does not fit: a step in last stage needs 26.00 GiB" in capsys.readouterr().err


def test_each_stage_has_a_plan_and_the_one_with_the_most_memory_counts(
    digits_npz, monkeypatch, capsys, tmp_path
):
    def compile_instead(run, target, save):
        assert bool(save) == bool(run.config.stages)  # The program of the last stage is saved.
        size = 4 * GIB if run.config.accum_steps == 2 else GIB
        plan = dataclasses.replace(made_up(activations=size), flops=run.config.accum_steps * 10**12)
        return plan, [run.config.accum_steps]

    monkeypatch.setattr(plan_lib, "_plan_run", compile_instead)
    monkeypatch.setattr(sharding, "table", str)
    stages = ["--config.stages.low.until=4", "--config.stages.low.accum_steps=2"]
    file = tmp_path / "plan.json"
    argv = ["--placements", f"--json={file}", f"--save={tmp_path / 'step'}"]
    main(["plan", f"--config={TINY}:{digits_npz}", "--topology=cpu:8", *stages, *argv])
    told = capsys.readouterr().out
    assert told.startswith("[1]\n")
    assert "stage low, steps 1 to 4\n" in told
    assert "last stage (the config itself), steps 5 to 12\n" in told
    assert "all stages: 0.016 PFLOP, 133% of a run in the settings of the last stage" in told
    found = json.loads(file.read_text())
    assert [stage["total_steps"] for stage in found["stages"]] == [4, 8]
    assert found["memory"] == found["stages"][0]["memory"]
    assert (found["all_steps"], found["all_flops"]) == (12, 16 * 10**12)


def test_compilers_message_gives_the_size():
    text = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO"
        " temporaries (24.37G) exceeds available HBM (15.75G)."
    )
    assert plan_lib._bytes_needed(RuntimeError(text)) == int(24.37 * GIB)
    other = "Ran out of memory in memory space hbm. Used 17.50G of 15.75G hbm."
    assert plan_lib._bytes_needed(RuntimeError(other)) == int(17.5 * GIB)
    with pytest.raises(RuntimeError, match="no size"):
        plan_lib._bytes_needed(RuntimeError("RESOURCE_EXHAUSTED: no size"))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--topology=v9:4x4"], "no TPU 'v9'"),
        (["--topology=cpu:8", "--fit"], "--fit needs to know a device's memory"),
        (["--topology=cpu:8", "--config.batch_size=20"], "config.batch_size=20 is not divisible"),
        (["--topology=cpu:8", "--config.mesh.fsdp=3"], "config.mesh"),
        (["--topolgy=cpu:8"], "did you mean '--topology'"),
        (["--topology=cpu:8", "--config.data.name=nothing.npz"], "nothing.npz"),
    ],
)
def test_mistakes_are_one_line(argv, message, digits_npz, capsys):
    assert main(["plan", f"--config={TINY}:{digits_npz}", *argv]) == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]


def test_program_that_cannot_be_saved(monkeypatch, tmp_path):
    def refuse(compiled):
        raise ValueError("compile-only devices\nand more")

    monkeypatch.setattr(plan_lib.serialize_executable, "serialize", refuse)
    with pytest.raises(plan_lib.UserError, match=r"JAX cannot save this program: compile-only"):
        plan_lib.save_executable(object(), str(tmp_path / "step"))


def test_several_slices_need_data_to_span_them():
    from vit_jax.parallel.sharding import make_mesh

    devices = [SimpleNamespace(slice_index=i // 4) for i in range(8)]
    with pytest.raises(plan_lib.UserError, match="does not divide into 2 slices"):
        make_mesh({"data": 1, "fsdp": 8, "tensor": 1}, devices)


def test_what_counts_classes_can_be_planned_without_the_data(digits_npz):
    """The numbers of a class change no shape, and training will know them."""
    config = config_lib.load(f"{TINY}:npz={digits_npz}")
    config.task = {"name": "classification", "class_weights": "balanced"}
    config.data.update(source="tfds", name="cifar10", pp="decode|resize(8)")
    assert Run.build(config, source=data.expect(config.data)).task.info.class_counts is None
