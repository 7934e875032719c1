"""Heads: modules that turn the `Features` of a backbone into a task's outputs."""
