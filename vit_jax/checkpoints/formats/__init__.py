"""Checkpoint formats: one file for each, with the names and layouts of another codebase."""
