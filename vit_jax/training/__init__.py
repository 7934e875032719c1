"""Training and evaluation: the loop, the compiled step, and their supporting modules."""
