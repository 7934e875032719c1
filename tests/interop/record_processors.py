"""Records tests/golden/hf_tiny/processors.npz: what image processors make of one photograph.

    python tests/interop/record_processors.py

The geometry is that of the published ones at a smaller size. Needs torch, transformers and timm.
"""

import json
import pathlib
import tempfile

import numpy as np
import timm
import transformers
from PIL import Image

GOLDEN = pathlib.Path(__file__).parent.parent / "golden" / "hf_tiny"
SIDE = 16
SQUARE = {"size": {"height": SIDE, "width": SIDE}}
CUT = {"size": {"shortest_edge": SIDE + 3}, "crop_size": {"height": SIDE, "width": SIDE}}

# The class of transformers with its arguments for each origin.
PROCESSORS = {
    "aimv2": ("CLIPImageProcessorPil", CUT),
    "beit": ("BeitImageProcessorPil", SQUARE | {"do_center_crop": False}),
    "deit": (
        "DeiTImageProcessorPil",
        {"size": {"height": 18, "width": 18}, "crop_size": SQUARE["size"]},
    ),
    "mae": (
        "ViTImageProcessorPil",
        SQUARE | {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]},
    ),
    "vit": ("ViTImageProcessorPil", SQUARE),
}
CLIP = {"mean": [0.48145466, 0.4578275, 0.40821073], "std": [0.26862954, 0.26130258, 0.27577711]}
TIMM = {
    "eva02": CLIP | {"crop_pct": 1.0, "crop_mode": "squash", "interpolation": "bicubic"},
    "eva02_tiny": CLIP | {"crop_pct": 0.9, "crop_mode": "center", "interpolation": "bicubic"},
}


def main():
    photo = Image.open(GOLDEN / "photo.png").convert("RGB")
    arrays, described = {}, {}
    for name, (kind, arguments) in PROCESSORS.items():
        processor = getattr(transformers, kind)(**arguments)
        with tempfile.TemporaryDirectory() as folder:
            processor.save_pretrained(folder)
            text = pathlib.Path(folder, "preprocessor_config.json").read_text()
        described[name] = {"preprocessor_config.json": json.loads(text)}
        arrays[name] = np.asarray(processor(photo, return_tensors="np")["pixel_values"])[0]
    for name, settings in TIMM.items():
        stored = {"input_size": [3, SIDE, SIDE], **settings}
        described[name] = {"config.json": {"architecture": "x", "pretrained_cfg": stored}}
        transform = timm.data.create_transform(**stored | {"input_size": (3, SIDE, SIDE)})
        arrays[name] = transform(photo).numpy()
    arrays = {name: x.transpose(1, 2, 0).astype(np.float32) for name, x in arrays.items()}
    np.savez_compressed(GOLDEN / "processors.npz", described=json.dumps(described), **arrays)


if __name__ == "__main__":
    main()
