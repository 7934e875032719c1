"""Update rules that optax lacks or computes differently from the references; one rule per file.

A file `NAME.py` holds a function `NAME`, which `config.optim.name = "NAME"` finds; see
`vit_jax.optim.rule` for what it must return.
"""
