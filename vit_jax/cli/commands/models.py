"""`models`: lists the models that have names, or released checkpoints of them."""

import argparse
import collections
import sys

from vit_jax.cli.parser import Command
from vit_jax.errors import UserError


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="Names of models (default: all models)."
    )
    parser.add_argument(
        "--pretrained",
        nargs="?",
        const="*",
        metavar="PATTERN",
        help="List the weights that others have published on the Hugging Face hub and whose names"
        " contain the pattern, with image size, license and address.",
    )
    released = parser.add_argument_group("released checkpoints (AugReg, Steiner et al. 2022)")
    released.add_argument(
        "--released",
        action="store_true",
        help="List checkpoints instead: one fine-tuned checkpoint of each model, with the"
        " accuracy that its authors published.",
    )
    released.add_argument(
        "--index",
        metavar="FILE",
        help="The authors' index.csv, as a file or an address. With it, all checkpoints that"
        " match are listed, the best first.",
    )
    released.add_argument(
        "--pretraining",
        metavar="NAME",
        help="Only checkpoints that were pre-trained on i1k, i21k or i21k_30.",
    )
    released.add_argument(
        "--dataset",
        metavar="NAME",
        help="Only checkpoints that were fine-tuned on this dataset, such as imagenet2012.",
    )
    released.add_argument(
        "--resolution",
        type=int,
        metavar="N",
        help="Only checkpoints that were fine-tuned on images of N pixels a side.",
    )
    released.add_argument(
        "--top", type=int, metavar="N", help="Number of checkpoints listed (default: 10)."
    )


def _run(arguments: argparse.Namespace) -> None:
    flags = ("index", "pretraining", "dataset", "resolution", "top")
    given = {flag: getattr(arguments, flag) for flag in flags if getattr(arguments, flag)}
    if arguments.released:
        from vit_jax.checkpoints import released

        print(released.describe(model=arguments.names, **given))
        return
    if given:
        raise UserError(f"models: --{next(iter(given))} needs --released")
    from vit_jax.models import listing

    if arguments.pretrained is not None:
        if arguments.names:
            raise UserError("models: write the name as --pretrained=PATTERN")
        _print_published(arguments.pretrained)
        return
    print(f"{'name':20} {'parameters':>15} {'GFLOPs':>10} {'input':>6}")
    for row in listing.rows(arguments.names or None):
        print(f"{row.name:20} {row.params:>15,} {row.gflops:>10.2f} {row.input_size:>6}")


def _print_published(pattern: str) -> None:
    from vit_jax.models import listing

    found, left_out = listing.published(pattern)
    if not found and not left_out:
        raise UserError(f"no published name contains {pattern!r}; `models --pretrained` lists all")
    print(f"{'parameters':>15} {'GFLOPs':>10} {'input':>6}  {'license':24}  address")
    for model in found:
        sizes = f"{model.params:>15,} {model.gflops:>10.2f} {model.input_size:>6}"
        print(f"{sizes}  {model.license:24}  {model.origin}")
    if left_out:
        reasons = collections.Counter(reason.partition(": ")[2] for reason in left_out.values())
        listed = "; ".join(f"{count} × {reason}" for reason, count in reasons.most_common())
        names = "name" if len(left_out) == 1 else "names"
        print(f"{len(left_out)} more {names} cannot be built: {listed}", file=sys.stderr)


COMMAND = Command(
    summary="List models with their parameters and GFLOPs, or released checkpoints.",
    run=_run,
    add_arguments=_add_arguments,
    examples=(
        "models",
        "models vit_s16 bit_r50x1",
        "models --pretrained 'dinov2*'",
        "models --released vit_b16",
    ),
)
