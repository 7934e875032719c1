"""Random weights and statistics for models of timm, of which none is zero."""

import re

import torch


def draw(model):
    """Draws all parameters and statistics of batch norms anew, and sets the model to evaluation.

    The scales keep activations near one.
    """
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if re.search(r"gamma|ls\d", name):
            value = 0.5 + 0.2 * noise
        elif "freqs" in name:
            value = parameter * (1 + 0.1 * noise)
        elif parameter.ndim == 1 and name.endswith("weight"):
            value = 1 + 0.2 * noise
        elif parameter.ndim > 1 and name.endswith("weight"):
            value = noise / parameter[0].numel() ** 0.5
        else:
            value = 0.3 * noise
        parameter.data = value
    for name, buffer in model.named_buffers():
        if name.endswith(("running_mean", "running_var")):  # Variances must be positive.
            buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
    return model.eval()
