"""Training and evaluation: the loop, the compiled step, and what serves them."""
