"""Measures this machine: training steps, input, evaluation, starts, checkpoints.

Machines are noisy, so what is compared is measured in turns (A B A B ...) and reported as medians
and their ratio. Every benchmark returns a dictionary of plain numbers, units in the names.
"""
