"""Vision models as Flax Linen modules, built by name.

    model = models.build("vit_b16", num_classes=1000)
    params = model.init(key, images)["params"]
    logits = model.apply({"params": params}, images)

Images are normalised floats `[batch, height, width, channels]`. Every backbone returns
`vit_jax.types.Features`, so that every head fits every backbone. `train=True` switches on dropout,
drop path and patch dropout, which draw from the "dropout" key of `rngs`.

Every parameter carries logical axis names (`nn.LogicallyPartitioned`), which
`vit_jax.parallel.sharding` maps to the mesh: embed, heads, head_dim, mlp, layers (stacked blocks),
classes, patch_h, patch_w, channels; conv_h, conv_w, conv_in, conv_out (convolutional networks);
token_mixing (Mixer); vocab (text). Activations are constrained as batch, tokens, embed, heads,
head_dim, mlp.

A new model is one new file here with a table `VARIANTS`.
"""

from vit_jax.models.cost import example_input, flops, param_count, product_flops
from vit_jax.models.heads.classifier import Classifier
from vit_jax.models.heads.dense import Detector, Segmenter
from vit_jax.models.heads.open_vocabulary import OpenVocabularyDetector
from vit_jax.models.heads.two_towers import TowerOutputs, TwoTowers
from vit_jax.models.layers.basic import init_keys, outputs_of, token_stride
from vit_jax.models.layers.resize import resize_grid, resize_patch_kernel
from vit_jax.models.layers.transformer import stack_blocks, unstack_blocks
from vit_jax.models.listing import list_models
from vit_jax.models.registry import (
    Variant,
    build,
    field_names,
    find,
    find_variant,
    names,
    variants,
)
from vit_jax.models.traits import (
    Traits,
    backbone_of,
    effective_fields,
    fields_of,
    has_head,
    text_tower_of,
    traits_of,
)

__all__ = [
    "Classifier",
    "Detector",
    "OpenVocabularyDetector",
    "Segmenter",
    "TowerOutputs",
    "Traits",
    "TwoTowers",
    "Variant",
    "backbone_of",
    "build",
    "effective_fields",
    "example_input",
    "field_names",
    "fields_of",
    "find",
    "find_variant",
    "flops",
    "has_head",
    "init_keys",
    "list_models",
    "names",
    "outputs_of",
    "param_count",
    "product_flops",
    "resize_grid",
    "resize_patch_kernel",
    "stack_blocks",
    "text_tower_of",
    "token_stride",
    "traits_of",
    "unstack_blocks",
    "variants",
]
