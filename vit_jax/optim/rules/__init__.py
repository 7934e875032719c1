"""Update rules that optax lacks or that the references compute differently: one file, one rule.

A file `NAME.py` holds a function `NAME`, which `config.optim.name = "NAME"` finds; see
`vit_jax.optim.rule` for what it must return.
"""
