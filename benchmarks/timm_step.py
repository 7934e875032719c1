"""timm's training step: `timm_step.py MODEL BATCH_SIZE DTYPE [compile]`, served by `serving`."""

import os
import re
import time

from serving import Timed, UserMistake, import_timm, main

_SIZES = {
    "ti": "tiny", "s": "small", "b": "base", "l": "large", "h": "huge", "g": "giant",
    "G": "gigantic",
}  # fmt: skip


def timm_name(model: str) -> str:
    """Returns timm's name of one of our plain ViTs: `vit_s16` -> `vit_small_patch16_224`.

    Raises:
      UserMistake: the model is of another family.
    """
    match = re.fullmatch(r"vit_([a-zG]+)(\d\d)", model)
    if not match or match[1] not in _SIZES:
        raise UserMistake(
            "bench --against=timm compares plain ViTs such as vit_ti16, vit_s16 or vit_b32,"
            f" not {model}"
        )
    return f"vit_{_SIZES[match[1]]}_patch{match[2]}_224"


def prepare(model: str, batch_size: str, dtype: str, compiled: str = "") -> Timed:
    """Builds the model with fused AdamW and clipping, in autocast below float32; takes two steps.

    Raises:
      UserMistake: torch or timm is not installed, or timm has no such model.
    """
    name = timm_name(model)
    torch = import_timm()
    import timm

    if not timm.is_model(name):
        raise UserMistake(f"bench --against: timm has no model {name}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    network = timm.create_model(name, num_classes=1000).to(device).train()
    params = list(network.parameters())
    optimizer = torch.optim.AdamW(params, lr=1e-3, weight_decay=0.05, fused=True)
    images = torch.rand(int(batch_size), 3, 224, 224, device=device)
    labels = torch.randint(0, 1000, (int(batch_size),), device=device)
    forward = torch.compile(network) if compiled else network
    enabled = dtype != "float32"

    def train_step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, getattr(torch, dtype), enabled=enabled):
            loss = torch.nn.functional.cross_entropy(forward(images), labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    def seconds_for(steps: int) -> float:
        wait()
        started = time.perf_counter()
        for _ in range(steps):
            train_step()
        wait()
        return time.perf_counter() - started

    seconds_for(2)
    return seconds_for


if __name__ == "__main__":
    main(prepare)
