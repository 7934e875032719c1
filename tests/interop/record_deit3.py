"""Records 30 steps of DeiT III's training at toy size, by timm's LAMB, loss and mixing.

    python tests/interop/record_deit3.py tests/golden/interop/deit3_steps.json

It needs torch and timm. The images, labels and initial parameters are drawn by NumPy from seeds, so
that the file holds only the losses, the norms of the gradients and the draws of mixing. The network
is written here with a kernel each for queries, keys and values, as this package has them, because
LAMB scales each tensor by its own norm.
"""

import json
import math
import sys

import numpy as np
import timm
import torch
import torch.nn.functional as F
from deit3_toy import BATCH, CLASSES, DECAY, END, LR, SIZES, STEPS, WARMUP, draw
from timm.data import Mixup
from timm.loss import BinaryCrossEntropy
from timm.optim import Lamb


def forward(p, images):
    batch, width, heads = len(images), SIZES["width"], SIZES["num_heads"]
    side = SIZES["size"] // SIZES["patch"]
    x = images.reshape(batch, side, 4, side, 4, 3).permute(0, 1, 3, 2, 4, 5)
    x = x.reshape(batch, side * side, -1) @ p["backbone/patch_embed/kernel"].reshape(-1, width)
    x = x + p["backbone/patch_embed/bias"] + p["backbone/pos_embed"]
    x = torch.cat([p["backbone/cls"].expand(batch, -1, -1), x], 1)

    def norm(x, name):
        return F.layer_norm(x, (width,), p[f"{name}/scale"], p[f"{name}/bias"], 1e-6)

    for i in range(SIZES["depth"]):
        block = f"backbone/blocks_{i}"
        y = norm(x, f"{block}/norm1")
        q, k, v = (
            torch.einsum("bnw,whd->bhnd", y, p[f"{block}/attn/{name}/kernel"])
            + p[f"{block}/attn/{name}/bias"][None, :, None]
            for name in ("query", "key", "value")
        )
        weights = (q @ k.transpose(-1, -2) / math.sqrt(width // heads)).softmax(-1)
        y = torch.einsum("bhnd,hdw->bnw", weights @ v, p[f"{block}/attn/out/kernel"])
        x = x + p[f"{block}/scale1"] * (y + p[f"{block}/attn/out/bias"])
        y = norm(x, f"{block}/norm2")
        y = y @ p[f"{block}/mlp/dense1/kernel"] + p[f"{block}/mlp/dense1/bias"]
        y = F.gelu(y, approximate="tanh")
        y = y @ p[f"{block}/mlp/dense2/kernel"] + p[f"{block}/mlp/dense2/bias"]
        x = x + p[f"{block}/scale2"] * y
    return norm(x, "backbone/norm")[:, 0] @ p["head/kernel"] + p["head/bias"]


def rate(step):
    """The multiplier of LR: a linear warm-up times a cosine to END after it."""
    progress = max(0, step - WARMUP) / (STEPS - WARMUP)
    curve = END / LR + (1 - END / LR) * 0.5 * (1 + math.cos(math.pi * progress))
    return curve * min(1, step / WARMUP)


def main(path):
    initial, images, labels = draw()
    params = {name: torch.nn.Parameter(torch.tensor(value)) for name, value in initial.items()}
    kernels = [p for name, p in params.items() if name.endswith("/kernel")]
    others = [p for name, p in params.items() if not name.endswith("/kernel")]
    groups = [{"params": kernels, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}]
    optimizer = Lamb(groups, lr=LR, betas=(0.9, 0.999), eps=1e-8, max_grad_norm=1.0)
    loss_of = BinaryCrossEntropy(smoothing=0.0, target_threshold=0.0)
    mixing = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=0.0, num_classes=CLASSES)
    np.random.seed(0)  # noqa: NPY002 (timm draws from it)
    rows = []
    for step in range(STEPS):
        x = torch.tensor(images[step]).permute(0, 3, 1, 2).contiguous()
        original = x.clone()
        x, targets = mixing(x, torch.tensor(labels[step]))
        mixed = box_and_share((x != original).any(1).any(0).numpy(), targets, labels[step])
        logits = forward(params, x.permute(0, 2, 3, 1))
        loss = loss_of(logits, targets)
        optimizer.zero_grad()
        loss.backward()
        norm = math.sqrt(sum(float((p.grad.double() ** 2).sum()) for p in params.values()))
        for group in optimizer.param_groups:
            group["lr"] = LR * rate(step)
        optimizer.step()
        rows.append({"loss": loss.item(), "grad_norm": norm, **mixed})
    record = {
        "about": "Steps of DeiT III at toy size by timm's Lamb, BinaryCrossEntropy and Mixup, which"
        " tests/interop/record_deit3.py ran and describes. `share` is an image's own share.",
        "versions": {"timm": timm.__version__, "torch": torch.__version__},
        "steps": rows,
    }
    with open(path, "w") as file:
        json.dump(record, file, indent=1)
        file.write("\n")


def box_and_share(changed, targets, labels):
    """The box that cutmix pasted, [] after mixup, and the share of an image's own label."""
    inside = np.argwhere(changed)
    edges = [*inside.min(0), *(inside.max(0) + 1)] if len(inside) else [0, 0, 0, 0]
    # Mixup changes every pixel.
    box = [] if changed.all() else [int(edge) for edge in edges]
    row = next(i for i in range(BATCH) if labels[i] != labels[BATCH - 1 - i])
    return {"box": box, "share": float(targets[row, labels[row]])}


if __name__ == "__main__":
    main(sys.argv[1])
