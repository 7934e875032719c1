"""timm's training step."""

import os
import re
import time

from vit_jax.bench.timm_loader import import_torch
from vit_jax.errors import UserError

_SIZES = {
    "ti": "tiny", "s": "small", "b": "base", "l": "large", "h": "huge", "g": "giant",
    "G": "gigantic",
}  # fmt: skip


def timm_name(model: str) -> str:
    """What timm calls one of our plain ViTs: `vit_s16` → `vit_small_patch16_224`.

    Raises:
      UserError: another family.
    """
    match = re.fullmatch(r"vit_([a-zG]+)(\d\d)", model)
    if not match or match[1] not in _SIZES:
        raise UserError(
            f"bench --against=timm compares plain ViTs such as vit_ti16, vit_s16 or vit_b32, "
            f"not {model}"
        )
    return f"vit_{_SIZES[match[1]]}_patch{match[2]}_224"


class TorchStep:
    """timm's model with fused AdamW and clipping, in autocast below float32.

    compiled: through `torch.compile`.

    Raises:
      UserError: torch or timm is not installed, or timm has no such model.
    """

    def __init__(self, model: str, batch_size: int, dtype: str, compiled: bool):
        name = timm_name(model)
        torch = import_torch()
        import timm

        if not timm.is_model(name):
            raise UserError(f"bench --against: timm has no model {name}")
        self._torch = torch
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        self._autocast = torch.autocast(
            self._device.type, getattr(torch, dtype), enabled=dtype != "float32"
        )
        model = timm.create_model(name, num_classes=1000).to(self._device).train()
        self._params = list(model.parameters())
        self._model = torch.compile(model) if compiled else model
        self._optimizer = torch.optim.AdamW(self._params, lr=1e-3, weight_decay=0.05, fused=True)
        self._images = torch.rand(batch_size, 3, 224, 224, device=self._device)
        self._labels = torch.randint(0, 1000, (batch_size,), device=self._device)
        self.first_seconds = self.seconds(2)

    def seconds(self, steps: int) -> float:
        """How long so many steps take, one after the other."""
        self._wait()
        started = time.perf_counter()
        for _ in range(steps):
            self._step()
        self._wait()
        return time.perf_counter() - started

    def _step(self) -> None:
        functional = self._torch.nn.functional
        self._optimizer.zero_grad(set_to_none=True)
        with self._autocast:
            loss = functional.cross_entropy(self._model(self._images), self._labels)
        loss.backward()
        self._torch.nn.utils.clip_grad_norm_(self._params, 1.0)
        self._optimizer.step()

    def _wait(self) -> None:
        if self._device.type == "cuda":
            self._torch.cuda.synchronize()
