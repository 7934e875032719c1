"""Models by their names on the Hugging Face hub, such as `facebook/dinov2-base`.

Each name stands for the fields of `VisionTransformer` that its published config describes, so that
a run can be configured without the files of the model.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from vit_jax.models.registry import Variant
from vit_jax.models.vit import SIZES, VisionTransformer

Fields = Mapping[str, Any]

_SIZES: Mapping[str, Fields] = {
    **SIZES,
    "dinov2_g": {**SIZES["gopt"], "num_heads": 24, "mlp_dim": 4096, "mlp": "swiglu"},
    "s_plus": {**SIZES["s"], "mlp": "swiglu"},
    "h_plus": {**SIZES["h"], "num_heads": 20, "mlp_dim": 5120, "mlp": "swiglu"},
    "7b": {"width": 4096, "depth": 40, "num_heads": 32, "mlp_dim": 8192, "mlp": "swiglu"},
    "coca_b": {**SIZES["b"], "map_dim": 512},
    "coca_l": {**SIZES["l"], "map_dim": 768},
    "aim_l": {"width": 1024, "depth": 24, "num_heads": 8, "mlp_dim": 2816},
    "aim_h": {"width": 1536, "depth": 24, "num_heads": 12, "mlp_dim": 4096},
    "aim_1b": {"width": 2048, "depth": 24, "num_heads": 16, "mlp_dim": 5632},
    "aim_3b": {"width": 3072, "depth": 24, "num_heads": 24, "mlp_dim": 8192},
}

_EXACT = {"activation": "gelu"}
_HF_VIT = {**_EXACT, "norm_epsilon": 1e-12}
_CLIP = {"pre_norm": True, "patch_bias": False, "norm_epsilon": 1e-5}

# The fields that the names of a table share; each row is a name, a size, and the side of a patch.
_TABLES: tuple[tuple[Fields, str], ...] = (
    (
        _HF_VIT,
        """
        google/vit-base-patch16-224                b 16
        google/vit-base-patch16-224-in21k          b 16
        google/vit-base-patch16-384                b 16
        google/vit-base-patch32-224-in21k          b 32
        google/vit-base-patch32-384                b 32
        google/vit-large-patch16-224               l 16
        google/vit-large-patch16-224-in21k         l 16
        google/vit-large-patch16-384               l 16
        google/vit-large-patch32-224-in21k         l 32
        google/vit-large-patch32-384               l 32
        google/vit-huge-patch14-224-in21k          h 14
        facebook/dino-vits8                        s 8
        facebook/dino-vits16                       s 16
        facebook/dino-vitb8                        b 8
        facebook/dino-vitb16                       b 16
        facebook/deit-tiny-patch16-224             ti 16
        facebook/deit-small-patch16-224            s 16
        facebook/deit-base-patch16-224             b 16
        facebook/deit-base-patch16-384             b 16
        facebook/vit-mae-base                      b 16
        facebook/vit-mae-large                     l 16
        facebook/vit-mae-huge                      h 14
        """,
    ),
    (
        {**_HF_VIT, "distill_token": True},
        """
        facebook/deit-tiny-distilled-patch16-224   ti 16
        facebook/deit-small-distilled-patch16-224  s 16
        facebook/deit-base-distilled-patch16-224   b 16
        facebook/deit-base-distilled-patch16-384   b 16
        """,
    ),
    (
        _EXACT,
        """
        facebook/vit-msn-small                     s 16
        facebook/vit-msn-base                      b 16
        facebook/vit-msn-large                     l 16
        """,
    ),
    (
        {**_EXACT, "layer_scale": 1.0},
        """
        facebook/dinov2-small                      s 14
        facebook/dinov2-base                       b 14
        facebook/dinov2-large                      l 14
        facebook/dinov2-giant                      dinov2_g 14
        """,
    ),
    (
        {**_EXACT, "layer_scale": 1.0, "num_registers": 4},
        """
        facebook/dinov2-with-registers-small       s 14
        facebook/dinov2-with-registers-base        b 14
        facebook/dinov2-with-registers-large       l 14
        facebook/dinov2-with-registers-giant       dinov2_g 14
        """,
    ),
    (
        {
            **_EXACT,
            "norm_epsilon": 1e-5,
            "layer_scale": 1.0,
            "num_registers": 4,
            "position": "rope_dinov3",
            "key_bias": False,
        },
        """
        facebook/dinov3-vits16-pretrain-lvd1689m       s 16
        facebook/dinov3-vits16plus-pretrain-lvd1689m   s_plus 16
        facebook/dinov3-vitb16-pretrain-lvd1689m       b 16
        facebook/dinov3-vitl16-pretrain-lvd1689m       l 16
        facebook/dinov3-vith16plus-pretrain-lvd1689m   h_plus 16
        facebook/dinov3-vit7b16-pretrain-lvd1689m      7b 16
        """,
    ),
    (
        {"pooling": "map"},
        """
        google/siglip-base-patch16-224             b 16
        google/siglip-base-patch16-256             b 16
        google/siglip-base-patch16-384             b 16
        google/siglip-base-patch16-512             b 16
        google/siglip-large-patch16-256            l 16
        google/siglip-large-patch16-384            l 16
        google/siglip-so400m-patch14-224           so400m 14
        google/siglip-so400m-patch14-384           so400m 14
        google/siglip2-base-patch16-224            b 16
        google/siglip2-base-patch16-256            b 16
        google/siglip2-base-patch16-384            b 16
        google/siglip2-base-patch16-512            b 16
        google/siglip2-base-patch32-256            b 32
        google/siglip2-large-patch16-256           l 16
        google/siglip2-large-patch16-384           l 16
        google/siglip2-large-patch16-512           l 16
        google/siglip2-so400m-patch14-224          so400m 14
        google/siglip2-so400m-patch14-384          so400m 14
        google/siglip2-so400m-patch16-256          so400m 16
        google/siglip2-so400m-patch16-384          so400m 16
        google/siglip2-so400m-patch16-512          so400m 16
        google/siglip2-giant-opt-patch16-256       gopt 16
        google/siglip2-giant-opt-patch16-384       gopt 16
        """,
    ),
    (
        {**_CLIP, "activation": "quick_gelu"},
        """
        openai/clip-vit-base-patch32               b 32
        openai/clip-vit-base-patch16               b 16
        openai/clip-vit-large-patch14              l 14
        openai/clip-vit-large-patch14-336          l 14
        """,
    ),
    (
        {**_CLIP, "activation": "gelu"},
        """
        laion/CLIP-ViT-B-32-laion2B-s34B-b79K      b 32
        laion/CLIP-ViT-B-16-laion2B-s34B-b88K      b 16
        laion/CLIP-ViT-L-14-laion2B-s32B-b82K      l 14
        laion/CLIP-ViT-H-14-laion2B-s32B-b79K      h 14
        laion/CLIP-ViT-g-14-laion2B-s12B-b42K      g 14
        laion/CLIP-ViT-bigG-14-laion2B-39B-b160k   G 14
        """,
    ),
    (
        {
            **_CLIP,
            "activation": "gelu",
            "pooling": "map",
            "pool_prefix": True,
            "class_token": True,
            "map_mlp": False,
            "map_heads": 8,
            "fc_norm": True,
        },
        """
        laion/CoCa-ViT-B-32-laion2B-s13B-b90k      coca_b 32
        laion/CoCa-ViT-L-14-laion2B-s13B-b90k      coca_l 14
        """,
    ),
    (
        {
            **_HF_VIT,
            "pooling": "mean",
            "class_token": True,
            "position": "none",
            "position_bias": "table",
            "key_bias": False,
            "layer_scale": 0.1,
            "last_norm": False,
            "fc_norm": True,
        },
        """
        microsoft/beit-base-patch16-224                 b 16
        microsoft/beit-base-patch16-384                 b 16
        microsoft/beit-base-patch16-224-pt22k-ft22k     b 16
        microsoft/beit-large-patch16-224                l 16
        microsoft/beit-large-patch16-384                l 16
        microsoft/beit-large-patch16-512                l 16
        microsoft/beit-large-patch16-224-pt22k-ft22k    l 16
        """,
    ),
    (
        {
            "norm": "rmsnorm",
            "norm_epsilon": 1e-5,
            "pooling": "mean",
            "mlp": "swiglu",
            "embed_norm": True,
            "qkv_bias": False,
            "proj_bias": False,
            "mlp_bias": False,
        },
        """
        apple/aimv2-large-patch14-224              aim_l 14
        apple/aimv2-huge-patch14-224               aim_h 14
        apple/aimv2-1B-patch14-224                 aim_1b 14
        apple/aimv2-3B-patch14-224                 aim_3b 14
        """,
    ),
)


def _rows() -> Iterator[tuple[str, Fields]]:
    for shared, table in _TABLES:
        for row in table.strip().splitlines():
            name, size, patch = row.split()
            yield name, {**_SIZES[size], "patch_size": int(patch), **shared}


VARIANTS = {name: Variant(VisionTransformer, fields, input_size=None) for name, fields in _rows()}
