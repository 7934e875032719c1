"""Draws docs/figures/vit_or_cnn.png: accuracies of the runs that docs/recipes.md lists.

    python docs/vit_or_cnn.py RUNS OUT.png

RUNS holds a workdir for each model, kind and seed, such as `vit-scratch-0`.
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from vit_jax.tracking import read_metrics

MODELS = {"vit": ("ViT", "tab:blue"), "bit": ("BiT-ResNet", "tab:orange")}
KINDS = {
    "scratch": "digits 5 to 9\nfrom scratch",
    "transfer": "digits 5 to 9\npre-trained on 0 to 4",
}


def accuracies(runs: Path, model: str, kind: str) -> np.ndarray:
    """Final test accuracies of all finished seeds, percent."""
    workdirs = sorted(path.parent for path in runs.glob(f"{model}-{kind}-[0-9]*/DONE"))
    last = [
        [row for row in read_metrics(path) if "eval/test/accuracy" in row][-1] for path in workdirs
    ]
    return 100 * np.array([row["eval/test/accuracy"] for row in last])


def main(runs: str, out: str) -> None:
    """Prints the numbers as rows of a table and draws them."""
    figure, axes = plt.subplots(figsize=(6, 3.4), layout="constrained")
    for shift, (model, (name, color)) in zip((-0.12, 0.12), MODELS.items(), strict=True):
        for place, kind in enumerate(KINDS):
            found = accuracies(Path(runs), model, kind)
            seeds = ", ".join(f"{value:.1f}" for value in found)
            print(f"| {name} | {kind} | {seeds} | {found.mean():.1f} |")
            label = name if place == 0 else None
            axes.plot([place + shift] * len(found), found, "o", color=color, alpha=0.5)
            axes.plot(place + shift, found.mean(), "_", color=color, ms=26, mew=3, label=label)
    axes.set_xticks(range(len(KINDS)), KINDS.values())
    axes.set_ylabel("test accuracy, %")
    axes.grid(axis="y", alpha=0.3)
    axes.legend(frameon=False, loc="center")
    axes.set_xlim(-0.5, len(KINDS) - 0.5)
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    main(*sys.argv[1:])
