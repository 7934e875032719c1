"""Records tests/golden/interop/other_sizes.npz: the tiny models at another size of images.

    python tests/interop/record_sizes.py

Each model of `hf_tiny` and `timm_tiny` that is named here is opened by its own library, which
resizes its positions for images of 24 x 16 in its own way. Needs the extra `interop`.
"""

import json
import pathlib

import numpy as np
import torch
from real_packages import import_packages
from safetensors.torch import load_file

timm, transformers = import_packages()

GOLDEN = pathlib.Path(__file__).parent.parent / "golden"

TRANSFORMERS = ("beit", "clip_vision", "dinov2", "dinov2_registers", "siglip_vision", "vit")
TIMM = {
    "vit_base_patch16_224": timm.models.vision_transformer,
    "beit_base_patch16_224": timm.models.beit,
    "eva02_base_patch14_224": timm.models.eva,
}
NAFLEX = ("siglip", "parfac_gap", "radio_v3")


def taller(images):
    """Returns images `[n, 3, 24, 16]` of recorded ones `[n, 16, 16, 3]`."""
    x = torch.tensor(images).permute(0, 3, 1, 2)
    return torch.cat([x, x[:, :, :8]], dim=2)


def of_transformers(case, x):
    folder = GOLDEN / "hf_tiny" / case
    kind = json.loads((folder / "config.json").read_text())["architectures"][0]
    model = getattr(transformers, kind).from_pretrained(folder, dtype=torch.float32).eval()
    if case == "siglip2_naflex":
        patches = x.reshape(2, 3, 6, 4, 4, 4).permute(0, 2, 4, 3, 5, 1).reshape(2, 24, -1)
        mask, shapes = torch.ones(2, 24, dtype=torch.long), torch.tensor([[6, 4]] * 2)
        inputs = {"pixel_values": patches, "pixel_attention_mask": mask, "spatial_shapes": shapes}
        return model(**inputs).pooler_output
    # DINOv2 needs no such argument, and resizes always.
    more = {} if case.startswith("dinov2") else {"interpolate_pos_encoding": True}
    out = model(x, **more)
    if case == "siglip_vision":
        return out.pooler_output
    found = [getattr(out, key, None) for key in ("logits", "image_embeds")]
    found += [out.last_hidden_state[:, 0]] if hasattr(out, "last_hidden_state") else []
    return next(one for one in found if one is not None)


def of_timm(case, x):
    folder = GOLDEN / "timm_tiny" / case
    arguments = json.loads((folder / "config.json").read_text())["model_args"]
    state = load_file(folder / "model.safetensors")
    if case in TIMM:
        model = timm.create_model(case, num_classes=3, **{**arguments, "img_size": (24, 16)})
        state = TIMM[case].checkpoint_filter_fn(state, model)
    else:
        model = timm.create_model(case, num_classes=3, **arguments)
    model.load_state_dict(state)
    return model.eval()(x)


def main():
    theirs = np.load(GOLDEN / "hf_tiny" / "images.npz")["images"]
    cases = (*TRANSFORMERS, "siglip2_naflex")
    found = {case: of_transformers(case, taller(theirs)) for case in cases}
    shared = np.load(GOLDEN / "timm_tiny" / "images.npz")["images"]
    for case in (*TIMM, *(f"naflexvit_base_patch16_{kind}" for kind in NAFLEX)):
        own = np.load(GOLDEN / "timm_tiny" / case / "io.npz")
        found[case] = of_timm(case, taller(own.get("images", shared)))
    arrays = {case: output.numpy() for case, output in found.items()}
    np.savez_compressed(GOLDEN / "interop" / "other_sizes.npz", **arrays)


if __name__ == "__main__":
    with torch.no_grad():
        main()
