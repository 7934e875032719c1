"""A small BiT in its published names, made from a seed; `interop/bit.npz` holds timm's logits."""

import numpy as np

STAGES, WIDTH, CLASSES = (2, 1), 32, 3


def published():
    """The arrays of the file, none of them zero."""
    rng = np.random.default_rng(5)
    out = {}

    def conv(name, size, inputs, outputs):
        shape = (size, size, inputs, outputs)
        out[f"resnet/{name}/kernel"] = rng.normal(size=shape).astype(np.float32)

    def norm(name, channels):
        for value, centre in (("gamma", 1.0), ("beta", 0.0)):
            array = centre + 0.2 * rng.normal(size=channels)
            out[f"resnet/{name}/group_norm/{value}"] = array.astype(np.float32)

    conv("root_block/standardized_conv2d", 7, 3, WIDTH)
    channels = WIDTH
    for stage, units in enumerate(STAGES, 1):
        width = WIDTH * 2 ** (stage - 1)
        for number in range(1, units + 1):
            unit = f"block{stage}/unit{number:02d}"
            if number == 1:
                conv(f"{unit}/a/proj/standardized_conv2d", 1, channels, 4 * width)
            sizes = {"a": (1, channels, width), "b": (3, width, width), "c": (1, width, 4 * width)}
            for part, (size, inputs, outputs) in sizes.items():
                norm(f"{unit}/{part}", inputs)
                conv(f"{unit}/{part}/standardized_conv2d", size, inputs, outputs)
            channels = 4 * width
    norm("", channels)
    out = {name.replace("resnet//", "resnet/"): array for name, array in out.items()}
    kernel, bias = rng.normal(size=(1, 1, channels, CLASSES)), rng.normal(size=CLASSES)
    out["resnet/head/conv2d/kernel"] = kernel.astype(np.float32)
    out["resnet/head/conv2d/bias"] = bias.astype(np.float32)
    return out


def images():
    """Float `[2, 36, 52, 3]`; neither side is a multiple of the stride."""
    return np.random.default_rng(6).uniform(-1, 1, (2, 36, 52, 3)).astype(np.float32)


def in_big_vision_names(arrays):
    """The same file as big_vision's `bit_paper` writes it, norms with axes of the image."""
    out = {}
    for name, array in arrays.items():
        path = name.removeprefix("resnet/")
        for theirs, ours in (
            ("root_block/standardized_conv2d", "root_block/conv_root"),
            ("a/proj/standardized_conv2d", "conv_proj"),
            ("a/standardized_conv2d", "conv1"),
            ("b/standardized_conv2d", "conv2"),
            ("c/standardized_conv2d", "conv3"),
            ("a/group_norm", "gn1"),
            ("b/group_norm", "gn2"),
            ("c/group_norm", "gn3"),
            ("group_norm", "norm-pre-head"),
            ("head/conv2d", "head"),
            ("gamma", "scale"),
            ("beta", "bias"),
        ):
            path = path.replace(theirs, ours)
        is_norm = "gn" in path or "norm" in path
        head = array[0, 0] if path == "head/kernel" else array
        out[f"params/{path}"] = array[None, None, None] if is_norm else head
    return out
