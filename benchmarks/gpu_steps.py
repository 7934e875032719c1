"""The speed of training steps on a GPU, ours and timm's, and of the host's input: for `gpu.py`.

A measurement is a function of the sizes and of what was measured before, and returns plain numbers
with their units in the names. It raises `Skipped` where it cannot be done.
"""

import contextlib
import dataclasses
import importlib.util
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from vit_jax import config as config_lib
from vit_jax.bench.model import Case, OurStep, figures, in_turns, ratio
from vit_jax.bench.rivals import Rival
from vit_jax.errors import UserError, is_out_of_memory

CONFIGS = Path(__file__).parents[1] / "configs"
ATTENTIONS = ("xla", "cudnn")
FILLED = 0.9
"""The share of the memory that the largest batch may take by the compiler's plan."""

MOST = 8
"""The largest batch is sought up to this multiple of the usual one."""

Measured = Mapping[str, Any]
"""The results of earlier measurements, by name."""


class Skipped(Exception):
    """The measurement cannot be done here. The message is the reason, on one line."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The sizes of all measurements.

    Attributes:
      models: the models whose steps are compared with timm's.
      batch_size: images of their steps and of MAE's; DINOv2 takes a quarter, each as ten crops.
      steps: steps of each turn. rounds: turns.
      fields: fields of every backbone that replace the model's own.
      decoder, head: fields of MAE's decoder and of DINOv2's head that replace the usual ones.
      fused: the implementation of attention that is held against XLA's. tokens: in these lengths.
      goldens: the number of recorded models to compare with; None for all.
      memory: bytes of a device that does not tell its own.
      photographs: the host's batches, and their size.
    """

    name: str = "full"
    models: tuple[str, ...] = ("vit_s16", "vit_b16", "vit_l16")
    batch_size: int = 256
    steps: int = 10
    rounds: int = 5
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    decoder: Mapping[str, int] = dataclasses.field(default_factory=dict)
    head: Mapping[str, int] = dataclasses.field(default_factory=dict)
    fused: str = "cudnn"
    tokens: tuple[int, ...] = (196, 197)
    goldens: int | None = None
    memory: int = 0
    photographs: tuple[int, int] = (50, 128)


TINY = Sizes(
    name="tiny",
    models=("vit_s16",),
    batch_size=4,
    steps=1,
    rounds=1,
    fields={"width": 16, "depth": 1, "num_heads": 2, "mlp_dim": 32},
    decoder={"width": 16, "depth": 1, "num_heads": 2},
    head={"num_prototypes": 32, "head_hidden": 16, "head_bottleneck": 8},
    fused="heads_first",
    tokens=(9,),
    goldens=1,
    memory=2**25,
    photographs=(1, 4),
)


def compared(model: str, sizes: Sizes, _: Measured) -> dict[str, Any]:
    """Measures a step with XLA's attention and with cuDNN's, in turns with timm's compiled step."""
    found: dict[str, Any] = {"batch_size": sizes.batch_size}
    ours: dict[str, OurStep] = {}
    with contextlib.ExitStack() as opened:
        for attention in ATTENTIONS:
            with _explaining(found, attention):
                ours[attention] = OurStep(_config(model, sizes.batch_size, attention, sizes))
        timed = {name: step.seconds for name, step in ours.items()}
        with _explaining(found, "timm"):
            timm = opened.enter_context(_timm(model, sizes.batch_size))
            timed["timm"] = timm.seconds
        if not ours:
            raise Skipped("; ".join(found[name]["skipped"] for name in ATTENTIONS))
        seconds, rate = in_turns(timed, sizes.steps, sizes.rounds, "bfloat16")
        if "timm" in timed:
            step = next(iter(ours.values()))
            found["timm"] = _figures_of_timm(timm, step, statistics.median(seconds["timm"]), rate)
    for name, step in ours.items():
        found[name] = _figures(step, seconds[name], rate)
        if "timm" in timed:
            found[name]["timm_time_ratio"] = ratio(seconds["timm"], seconds[name])
    return {**found, "matmul_gflops_per_sec": rate / 1e9}


def largest(model: str, sizes: Sizes, measured: Measured) -> dict[str, Any]:
    """Measures our faster step of a model on the most images that fit, alone on the device."""
    before = measured.get(name_of(model, sizes), {})
    done = [name for name in ATTENTIONS if "images_per_sec" in before.get(name, {})]
    if not done:
        raise Skipped(f"no step of {model} on {sizes.batch_size} images was measured")
    attention = max(done, key=lambda name: before[name]["images_per_sec"])
    batch_size = fitting(before[attention], before["batch_size"], _memory(sizes))
    found = alone(_config(model, batch_size, attention, sizes), sizes)
    return {"batch_size": batch_size, attention: found}


def largest_of_timm(model: str, sizes: Sizes, measured: Measured) -> dict[str, Any]:
    """Measures timm's step on the most images that fit, alone on the device."""
    before = measured.get(name_of(model, sizes), {}).get("timm", {})
    if not before.get("device_bytes"):
        raise Skipped(before.get("skipped", f"timm's memory for {model} was not measured"))
    batch_size = fitting(before, sizes.batch_size, _memory(sizes))
    with _timm(model, batch_size) as timm:
        seconds, rate = in_turns({"": timm.seconds}, sizes.steps, sizes.rounds, "bfloat16")
        flops = before["flops"] / sizes.batch_size * batch_size
        taken = statistics.median(seconds[""])
        numbers = {
            "step_seconds": taken,
            "images_per_sec": batch_size / taken,
            "compile_seconds": timm.ready_seconds,
            "device_bytes": timm.peak_bytes(),
            "matmul_fraction": flops / taken / rate,
        }
    return {"batch_size": batch_size, "timm": numbers}


def fitting(numbers: Mapping[str, float], batch_size: int, memory: int) -> int:
    """Returns the images that fill `FILLED` of the memory, by the figures of a smaller batch."""
    multiple = min(64, batch_size)
    per_image = (numbers["device_bytes"] - numbers["state_bytes"]) / batch_size
    images = int((FILLED * memory - numbers["state_bytes"]) / per_image)
    return min(MOST * batch_size, max(multiple, images // multiple * multiple))


def alone(config: Any, sizes: Sizes) -> dict[str, float]:
    """Measures the step of a config with nothing else on the device."""
    step = OurStep(config)
    seconds, rate = in_turns({"": step.seconds}, sizes.steps, sizes.rounds, "bfloat16")
    found = _figures(step, seconds[""], rate)
    told = jax.devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in told:
        found["peak_bytes"] = told["peak_bytes_in_use"]
    return found


def mae(sizes: Sizes, _: Measured) -> dict[str, Any]:
    """Measures a pre-training step of configs/mae_b16_i1k.py."""
    changed = {"batch_size": str(sizes.batch_size)}
    changed |= {f"model.{name}": str(value) for name, value in sizes.fields.items()}
    changed |= {f"task.decoder.{name}": str(value) for name, value in sizes.decoder.items()}
    config = config_lib.load(str(CONFIGS / "mae_b16_i1k.py"), changed)
    return {"batch_size": sizes.batch_size, "auto": alone(config, sizes)}


def dinov2(sizes: Sizes, _: Measured) -> dict[str, Any]:
    """Measures DINOv2 of ViT-S/14: two crops of 224 pixels and eight of 98 for each image."""
    config = config_lib.default_config()
    config.batch_size = sizes.batch_size // 4
    config.data.pp = (
        "decode|views('global', 2, 'inception_crop(224, 32, 100)|flip_lr')"
        "|views('local', 8, 'inception_crop(98, 5, 32)|flip_lr')|keep('global', 'local')"
    )
    config.model = {"name": "vit_s14", "dtype": "bfloat16", "layer_scale": 1e-5, **sizes.fields}
    config.task = {"name": "dinov2", **sizes.head}
    return {"batch_size": config.batch_size, "auto": alone(config, sizes)}


def host(sizes: Sizes, _: Measured) -> dict[str, Any]:
    """Measures how fast the host decodes photographs and augments them for the S/16 recipe."""
    if importlib.util.find_spec("tensorflow") is None:
        raise Skipped("tensorflow is not installed")
    from vit_jax.bench.input import bench_input, on_photographs

    config = on_photographs(config_lib.load(str(CONFIGS / "vit_s16_i1k.py")))
    batches, config.batch_size = sizes.photographs
    return bench_input(config, batches)


def name_of(model: str, sizes: Sizes) -> str:
    """Returns the name of the measurement in which a model is compared with timm's."""
    return f"{model}_{sizes.batch_size}"


def _config(model: str, batch_size: int, attention: str, sizes: Sizes) -> Any:
    return Case(model, batch_size, "bfloat16", {"attention": attention, **sizes.fields}).config()


def _figures(step: OurStep, seconds: list[float], rate: float) -> dict[str, float]:
    return {**figures(step, statistics.median(seconds), rate), "state_bytes": step.state_bytes}


def _figures_of_timm(timm: Rival, ours: OurStep, seconds: float, rate: float) -> dict[str, Any]:
    """Returns figures of timm's step; its model is ours, so FLOPs and state are counted on ours."""
    return {
        "step_seconds": seconds,
        "images_per_sec": ours.batch_size / seconds,
        "compile_seconds": timm.ready_seconds,
        "device_bytes": timm.peak_bytes(),
        "state_bytes": ours.state_bytes,
        "flops": ours.flops,
        "matmul_fraction": ours.flops / seconds / rate,
    }


@contextlib.contextmanager
def _timm(model: str, batch_size: int):
    for package in ("torch", "timm"):
        if importlib.util.find_spec(package) is None:
            raise Skipped(f"{package} is not installed")
    rival = Rival.of_step("timm-compile", model, batch_size, "bfloat16")
    with contextlib.closing(rival):
        yield rival


@contextlib.contextmanager
def _explaining(found: dict[str, Any], name: str):
    """Writes into `found` why one of several programs cannot be measured."""
    try:
        yield
    except (Skipped, UserError) as error:
        found[name] = {"skipped": str(error)}
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        found[name] = {"skipped": "it does not fit into the memory beside the others"}


def _memory(sizes: Sizes) -> int:
    """Returns the bytes that JAX may take on the device."""
    return (jax.devices()[0].memory_stats() or {}).get("bytes_limit", sizes.memory)
