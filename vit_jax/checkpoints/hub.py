"""Checkpoints on the Hugging Face hub: `hf://USER/REPO[/FILE][@REVISION]` becomes a local path.

`huggingface_hub` fetches the files into its cache, once. It obeys its environment variables:
HF_TOKEN for private and gated repositories, HF_HUB_OFFLINE=1 to use what was fetched before,
HF_HOME for the place of the cache, HF_ENDPOINT for another server. Only weights that hold nothing
but arrays, and the small files that describe them, are fetched; nothing of them is ever run.
"""

import functools
import os
import re
import types
from pathlib import Path

from etils import epath

from vit_jax import models
from vit_jax.checkpoints import files
from vit_jax.errors import UserError
from vit_jax.models import timm_names
from vit_jax.plugins import HUB_PREFIX

PREFIX = "hf://"

DESCRIPTIONS = (
    "config.json", "preprocessor_config.json", "open_clip_config.json", "tokenizer*.json",
    "special_tokens_map.json", "vocab.*", "merges.txt", "*.model",
)  # fmt: skip
"""Patterns of the files beside the weights that formats read."""

WEIGHTS = (
    ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json"),
    ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors"),
    ("pytorch_model.bin", "pytorch_model-*-of-*.bin", "pytorch_model.bin.index.json"),
)
"""Patterns of the files with weights. The first that a repository has is taken."""

_NAME = re.compile(r"(?P<repo>[^/@]+/[^/@]+)(/(?P<file>[^@]+))?(@(?P<revision>.+))?")
_REPO = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def address_of(name: str) -> str:
    """Returns the address of a model on the hub, for a name that people know it by; "" for others.

    These are the names of `vit_jax.models.build` that are those of the hub, such as
    `facebook/dinov2-base` and `timm/vit_base_patch16_224.augreg_in21k`, with or without `hf-hub:`.
    """
    name = name.removeprefix(HUB_PREFIX)
    if not _REPO.fullmatch(name) or Path(name).exists():
        return ""
    is_known = name in models.variants() or (name.startswith("timm/") and timm_names.find(name))
    return f"{PREFIX}{name}" if is_known else ""


def local_path(path: epath.PathLike) -> epath.PathLike:
    """Returns where the files of an address of the hub lie on this machine, which may fetch them.

    Args:
      path: `hf://USER/REPO[/FILE][@REVISION]`, or a name that `address_of` knows. Any other path is
        returned as it is.

    Raises:
      UserError: the address is wrong, what it names is not there, or the hub cannot be reached.
    """
    name = os.fspath(path)
    address = name if name.startswith(PREFIX) else address_of(name)
    return _fetched(address) if address else path


@functools.cache
def _fetched(address: str) -> str:
    found = _NAME.fullmatch(address.removeprefix(PREFIX))
    if not found:
        raise UserError(f"{address}: write {PREFIX}USER/REPO, {PREFIX}USER/REPO/FILE, or either"
                        " with @REVISION at its end")  # fmt: skip
    library = _library(address)
    keys = {"revision": found["revision"], "endpoint": os.environ.get("HF_ENDPOINT")}
    try:
        if found["file"]:
            return library.hf_hub_download(found["repo"], found["file"], **keys)
        return _folder(library, found["repo"], keys, address)
    except UserError:
        raise
    except Exception as error:  # The library passes on those of its connections and files.
        raise UserError(f"{address}: {_reason(library, error)}") from error


def _folder(library: types.ModuleType, repo: str, keys: dict[str, str | None], address: str) -> str:
    """Returns the folder with a repository's descriptions and its weights in one format."""
    for patterns in WEIGHTS:
        allowed = [*DESCRIPTIONS, *patterns]
        folder = library.snapshot_download(repo, allow_patterns=allowed, **keys)
        if any(any(Path(folder).glob(pattern)) for pattern in patterns):
            return folder
    names = ", ".join(patterns[0] for patterns in WEIGHTS)
    raise UserError(f"{address} has no weights under their usual names ({names}); name its file")


def _library(address: str) -> types.ModuleType:
    try:
        import huggingface_hub
    except ImportError as error:
        raise UserError(
            f"{address}: reading from the hub needs `pip install huggingface_hub` (the extra `hub`)"
        ) from error
    return huggingface_hub


def _reason(library: types.ModuleType, error: Exception) -> str:
    """Returns what went wrong and what to do, for an exception of the library."""
    errors = library.errors
    reasons = (
        (
            errors.GatedRepoError,
            "its owner asks for consent: agree on the page of the repository, and set HF_TOKEN",
        ),
        (
            errors.RepositoryNotFoundError,
            "the hub has no such repository; if it is a private one, set HF_TOKEN",
        ),
        (errors.RevisionNotFoundError, "the repository has no such branch, tag or commit"),
        (errors.RemoteEntryNotFoundError, "the repository has no such file"),
        (
            (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled),
            "the hub cannot be reached, and the files have not been fetched before; download the"
            " repository elsewhere and give the folder",
        ),
    )
    for kinds, reason in reasons:
        if isinstance(error, kinds):
            return reason
    return f"huggingface_hub says: {files.first_line(error)}"


def upload(folder: Path, address: str, *, private: bool = False) -> None:
    """Uploads the files of a folder to a repository, which is made if there is none.

    Raises:
      UserError: the address is wrong, or the hub cannot be reached or refuses.
    """
    found = _NAME.fullmatch(address.removeprefix(PREFIX)) if address.startswith(PREFIX) else None
    if not found or found["file"]:
        raise UserError(f"{address}: write {PREFIX}USER/REPO, or {PREFIX}USER/REPO@BRANCH")
    library = _library(address)
    api = library.HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
    try:
        api.create_repo(found["repo"], private=private, exist_ok=True)
        api.upload_folder(
            repo_id=found["repo"],
            folder_path=folder,
            revision=found["revision"],
            commit_message="Upload a model of vit_jax",
        )
    except Exception as error:
        raise UserError(f"{address}: {_reason(library, error)}") from error
