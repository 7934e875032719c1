"""Fitting the arrays of a checkpoint to a model: which model, which arrays, which shapes."""
