"""The toy of `record_deit3.py`: its sizes, and what NumPy draws from a seed."""

import numpy as np

STEPS, WARMUP, BATCH, CLASSES = 30, 5, 16, 10
LR, END, DECAY = 4e-3, 1e-5, 0.05
SIZES = {"size": 16, "patch": 4, "width": 24, "depth": 2, "num_heads": 2, "mlp_dim": 48}


def shapes():
    """Returns the shape of each parameter by name."""
    width, heads, hidden = SIZES["width"], SIZES["num_heads"], SIZES["mlp_dim"]
    num_patches = (SIZES["size"] // SIZES["patch"]) ** 2
    dim = width // heads
    found = {
        "backbone/patch_embed/kernel": (4, 4, 3, width),
        "backbone/patch_embed/bias": (width,),
        "backbone/pos_embed": (1, num_patches, width),
        "backbone/cls": (1, 1, width),
        "head/kernel": (width, CLASSES),
        "head/bias": (CLASSES,),
    }
    for i in range(SIZES["depth"]):
        block = f"backbone/blocks_{i}"
        for name in ("query", "key", "value"):
            found[f"{block}/attn/{name}/kernel"] = (width, heads, dim)
            found[f"{block}/attn/{name}/bias"] = (heads, dim)
        found |= {
            f"{block}/attn/out/kernel": (heads, dim, width),
            f"{block}/attn/out/bias": (width,),
            f"{block}/mlp/dense1/kernel": (width, hidden),
            f"{block}/mlp/dense1/bias": (hidden,),
            f"{block}/mlp/dense2/kernel": (hidden, width),
            f"{block}/mlp/dense2/bias": (width,),
            f"{block}/scale1": (width,),
            f"{block}/scale2": (width,),
        }
        for norm in ("norm1", "norm2"):
            found |= {f"{block}/{norm}/scale": (width,), f"{block}/{norm}/bias": (width,)}
    return found | {"backbone/norm/scale": (width,), "backbone/norm/bias": (width,)}


def initial(name, shape, rng):
    if name.endswith(("scale1", "scale2")):
        return np.full(shape, 0.1, np.float32)
    if name.endswith("/scale"):
        return np.ones(shape, np.float32)
    if name.endswith("/bias"):
        return np.zeros(shape, np.float32)
    return np.float32(0.02 * rng.standard_normal(shape))


def draw():
    """Returns the initial parameters by name, the images and the labels of all steps."""
    rng = np.random.default_rng(0)
    params = {name: initial(name, shape, rng) for name, shape in shapes().items()}
    images = np.float32(rng.standard_normal((STEPS, BATCH, SIZES["size"], SIZES["size"], 3)))
    return params, images, rng.integers(0, CLASSES, (STEPS, BATCH))
