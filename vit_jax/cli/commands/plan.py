"""`plan`: says what a run would take on machines that are not at hand."""

import argparse
from typing import TYPE_CHECKING

from vit_jax.cli.arguments import add_config, load_config, out_file, positive
from vit_jax.cli.parser import Command

if TYPE_CHECKING:
    from ml_collections import ConfigDict

    from vit_jax.planning.feeding import Rate


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser, required=True)
    machines = parser.add_argument_group("the machines")
    machines.add_argument(
        "--topology",
        default="",
        metavar="NAME",
        help="The devices: a TPU slice such as v5e:16x16 or v5p-512, or cpu:8 for 8 virtual CPU"
        " devices (default: the devices of this machine).",
    )
    machines.add_argument(
        "--slices",
        type=int,
        default=1,
        metavar="N",
        help="Number of TPU slices of that topology (default: %(default)s).",
    )
    machines.add_argument(
        "--input",
        metavar="FILE",
        default="",
        help="How fast the hosts prepare images: a file that `bench input --json=FILE` wrote on"
        " such a host, or `here` to measure this machine.",
    )
    machines.add_argument(
        "--write-rate",
        type=positive,
        default=100,
        metavar="MB",
        help="Megabytes per second that a host writes to the workdir, as `tpu check` measures it"
        " (default: %(default)s).",
    )
    parser.add_argument(
        "--fit",
        action="store_true",
        help="Search for the fastest settings that fit into memory. A compile takes a minute or"
        " more, so estimates rule out most settings first.",
    )
    output = parser.add_argument_group("output")
    output.add_argument(
        "--placements",
        action="store_true",
        help="Also print how each parameter is distributed over the devices.",
    )
    output.add_argument(
        "--json", type=out_file, metavar="FILE", help="Also write the plan to FILE, as JSON."
    )
    output.add_argument(
        "--save", type=out_file, metavar="FILE", help="Write the compiled program to FILE."
    )


def _run(arguments: argparse.Namespace) -> None:
    config = load_config(arguments)
    from vit_jax.planning import command, feeding

    rate = None
    if arguments.input == "here":
        rate = _rate_here(config)
    elif arguments.input:
        rate = feeding.read_rate(arguments.input)
    command.run(
        config,
        arguments.topology,
        arguments.slices,
        search=arguments.fit,
        placements=arguments.placements,
        rate=rate,
        write_rate=arguments.write_rate,
        json_file=arguments.json,
        save=arguments.save,
    )


def _rate_here(config: "ConfigDict") -> "Rate":
    """Measures how fast one core of this machine prepares photographs as the config asks."""
    from vit_jax.bench.input import bench_input, on_photographs
    from vit_jax.planning.feeding import Rate

    measured = bench_input(on_photographs(config), batches=10)
    rate = measured["images_per_sec_per_core"]
    return Rate(rate, f"{rate:,.0f} images/s a core, measured here on photographs")


COMMAND = Command(
    summary="Say what a run would take on machines that are not at hand.",
    run=_run,
    add_arguments=_add_arguments,
    examples=(
        "plan --config=configs/vit_s16_i1k.py --topology=v5e-256",
        "plan --config=configs/vit_i21k.py:vit_G14 --topology=v5e:16x16 --slices=4 --fit",
    ),
    notes="The training step is compiled for these devices by their own compiler, which runs on\n"
    "any CPU. Printed are memory, bytes sent between devices, and hours. The exit code is 3 if\n"
    "the step does not fit into memory. With config.stages each stage has its own table.",
    overrides=("config",),
)
