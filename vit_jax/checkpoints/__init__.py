"""Checkpoints: our own (Orbax, `store`) and other codebases' files."""
