"""Parallelism: the mesh, the start and the stop of processes, and facts about accelerators."""
