"""Measures this machine: training steps, input, evaluation, starts, checkpoints.

Machines are noisy, so compared programs are measured in turns (A B A B ...) and reported as medians
and their ratio. Every benchmark returns a dictionary of plain numbers with units in their names.
"""
