"""timm and transformers, imported so that any build of torchvision will do."""

import pytest


def import_packages():
    """(timm, transformers); skips the tests where they are not installed."""
    torch = pytest.importorskip("torch", reason="needs the extra `interop`")
    register = torch.library.register_fake
    # A torchvision built for CUDA cannot register its operators with a CPU build of torch, and
    # timm needs only its transforms.
    torch.library.register_fake = lambda *_, **__: lambda function: function
    try:
        pytest.importorskip("torchvision", reason="needs the extra `interop`")
    finally:
        torch.library.register_fake = register
    names = ("timm", "transformers")
    return tuple(pytest.importorskip(name, reason="needs the extra `interop`") for name in names)
