"""A plan's target would else decide how many devices these tests have."""

import jax

jax.devices()
