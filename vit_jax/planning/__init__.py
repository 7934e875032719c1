"""Plan before you pay: the real training step, compiled for machines that are not at hand.

target (a topology's devices) -> plan (compile, measure) -> table; fit (search what fits)
"""
