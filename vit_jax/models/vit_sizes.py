"""The sizes of Vision Transformers by the letters of their names."""

from collections.abc import Mapping


def _size(width: int, depth: int, num_heads: int, mlp_dim: int) -> dict[str, int]:
    return {"width": width, "depth": depth, "num_heads": num_heads, "mlp_dim": mlp_dim}


# Ti to L, H: Dosovitskiy et al. 2021 and Steiner et al. 2022; so400m: Alabdulmohsin et al. 2023;
# g, G: Zhai et al. 2022; e: Chen et al. 2023 (PaLI); mu, m and the opt forms: big_vision.
SIZES: Mapping[str, Mapping[str, int]] = {
    "mu": _size(32, 1, 2, 128),
    "ti": _size(192, 12, 3, 768),
    "s": _size(384, 12, 6, 1536),
    "m": _size(512, 12, 8, 2048),
    "b": _size(768, 12, 12, 3072),
    "l": _size(1024, 24, 16, 4096),
    "so400m": _size(1152, 27, 16, 4304),
    "h": _size(1280, 32, 16, 5120),
    "g": _size(1408, 40, 16, 6144),
    "gopt": _size(1536, 40, 16, 6144),
    "G": _size(1664, 48, 16, 8192),
    "Gopt": _size(1536, 48, 16, 8192),
    "e": _size(1792, 56, 16, 15360),
}
