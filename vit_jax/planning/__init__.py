"""Plans a run: compiles its training step for machines that are not available locally.

target (a topology's devices) -> plan (compile, measure) -> table; fit (search for what fits)
"""
