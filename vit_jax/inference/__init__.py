"""Trained models at work: predictions, features, few-shot probes, conversion."""
