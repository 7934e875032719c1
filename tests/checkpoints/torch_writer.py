"""Writes arrays as `torch.save` does, without torch."""

import pickle
import sys
import types
import zipfile
from unittest import mock

import numpy as np


class FloatStorage:
    """Stands for the class of torch in a pickle."""


def _rebuild_tensor_v2(*arguments):
    raise NotImplementedError


FloatStorage.__module__, _rebuild_tensor_v2.__module__ = "torch", "torch._utils"


class _Storage:
    def __init__(self, key, size):
        self.key, self.size = key, size


class _Tensor:
    def __init__(self, key, array):
        self.storage, self.shape = _Storage(key, array.size), array.shape
        self.strides = tuple(stride // array.itemsize for stride in array.strides)

    def __reduce__(self):
        return _rebuild_tensor_v2, (self.storage, 0, self.shape, self.strides, False, {})


class _Pickler(pickle.Pickler):
    def persistent_id(self, value):
        if isinstance(value, _Storage):
            return ("storage", FloatStorage, value.key, "cpu", value.size)
        return None


def save(arrays, path):
    """Writes contiguous float32 arrays by name as a state dict."""
    arrays = {name: np.ascontiguousarray(x, np.float32) for name, x in arrays.items()}
    torch, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")
    torch.FloatStorage, utils._rebuild_tensor_v2 = FloatStorage, _rebuild_tensor_v2
    state = {name: _Tensor(str(key), x) for key, (name, x) in enumerate(arrays.items())}
    with zipfile.ZipFile(path, "w") as archive:
        modules = {"torch": torch, "torch._utils": utils}
        with mock.patch.dict(sys.modules, modules), archive.open("a/data.pkl", "w") as stream:
            _Pickler(stream, 2).dump(state)
        for key, x in enumerate(arrays.values()):
            archive.writestr(f"a/data/{key}", x.tobytes())
