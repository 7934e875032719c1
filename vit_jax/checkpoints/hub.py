"""The Hugging Face hub: `hf://USER/REPO[/FILE][@REVISION]` becomes the path of a checkpoint.

Datasets have addresses of their own, `hf://datasets/USER/REPO`; see `dataset_path`.

`huggingface_hub` fetches the files into its cache, once. It obeys its environment variables:
HF_TOKEN for private and gated repositories, HF_HUB_OFFLINE=1 to use what was fetched before,
HF_HOME for the place of the cache, HF_ENDPOINT for another server, HF_HUB_DISABLE_XET=1 for servers
and networks without its protocol Xet. Only weights that hold nothing
but arrays, and the small files that describe them, are fetched; nothing of them is ever run.
"""

import contextlib
import functools
import glob
import os
import re
import traceback
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from etils import epath

from vit_jax import models
from vit_jax.errors import UserError, first_line
from vit_jax.models import timm_names
from vit_jax.plugins import HUB_PREFIX

PREFIX = "hf://"
DATASETS = "hf://datasets/"
"""The beginning of the address of a dataset."""

_OF_A_MODEL = (
    "config.json", "preprocessor_config.json", "processor_config.json", "open_clip_config.json",
)  # fmt: skip

DESCRIPTIONS = (
    *_OF_A_MODEL,
    "tokenizer*.json", "special_tokens_map.json", "vocab.*", "merges.txt", "*.model",
)  # fmt: skip
"""Patterns of the files beside the weights that formats read."""

WEIGHTS = (
    ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json"),
    ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors"),
    ("pytorch_model.bin", "pytorch_model-*-of-*.bin", "pytorch_model.bin.index.json"),
    ("open_clip_pytorch_model.bin",),
)
"""Patterns of the files with weights. The first that a repository has is taken."""

_OF_AN_EARLIER_PUSH = (
    *_OF_A_MODEL,
    *(name for names in WEIGHTS for name in names),
    *("model.npz", "vit_jax_config.json"),
)
"""Patterns of files that an upload deletes unless it brings them: they may be of another model."""

_NAME = re.compile(r"(?P<repo>[^/@]+/[^/@]+)(/(?P<file>[^@]+))?(@(?P<revision>.+))?")
_REPO = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_TIMM = "timm/"


def address_of(name: str) -> str:
    """Returns the address of a model on the hub, for a name that people know it by; "" for others.

    These are the names of `vit_jax.models.build` that are those of the hub, such as
    `facebook/dinov2-base`, with or without `hf-hub:`, and timm's names of pretrained weights, such
    as `vit_base_patch16_224.augreg_in21k`, with or without `timm/`.
    """
    name = name.removeprefix(HUB_PREFIX)
    if os.path.exists(name):  # Unlike pathlib's, it takes texts that are too long for a name.
        return ""
    tagged = name.removeprefix(_TIMM)
    if "/" not in tagged and "." in tagged and timm_names.find(tagged):
        return f"{PREFIX}{_TIMM}{tagged}"
    return f"{PREFIX}{name}" if _REPO.fullmatch(name) and name in models.variants() else ""


def local_path(path: epath.PathLike, *, weights: bool = True) -> epath.PathLike:
    """Returns where the files of an address of the hub lie on this machine, which may fetch them.

    Args:
      path: `hf://USER/REPO[/FILE][@REVISION]`, or a name that `address_of` knows. Any other path is
        returned as it is.
      weights: whether the weights are wanted, besides the small files that describe them.

    Raises:
      UserError: the address is wrong, what it names is not there, or the hub cannot be reached.
    """
    name = os.fspath(path)
    address = name if name.startswith(PREFIX) else address_of(name)
    return _fetched(address, weights) if address else path


_commits: dict[str, str] = {}
"""The commit that each address stood for when this process fetched from it."""


def commits_in(config: Any) -> dict[str, str]:
    """Returns the commits of the addresses that a config names and this process has fetched from.

    config: a text, such as an address or a name that `address_of` knows, or mappings and lists.
    """
    if isinstance(config, Mapping):
        config = list(config.values())
    if isinstance(config, list | tuple):
        return {k: v for entry in config for k, v in commits_in(entry).items()}
    if not isinstance(config, str) or not _commits:
        return {}
    named = address_of(config)
    return {
        address: commit
        for address, commit in _commits.items()
        if address == named or re.search(re.escape(address) + r"(?![\w@/.-])", config)
    }


def _noted(address: str, place: str) -> None:
    """Notes the commit of an address, which is the name of its folder in the library's cache."""
    _commits[address] = Path(place).name


@functools.cache
def _fetched(address: str, weights: bool) -> str:
    found = _parts(address)
    file = found["file"] or ""
    folder = f"{glob.escape(os.path.dirname(file))}/" if "/" in file else ""
    descriptions = [folder + pattern for pattern in DESCRIPTIONS]
    choices = ([glob.escape(file)],) if file else WEIGHTS
    library = _library(address)
    for patterns in choices if weights else ((),):
        allowed = [*descriptions, *patterns]
        with _explained(library, address):
            place = library.snapshot_download(
                found["repo"],
                allow_patterns=allowed,
                revision=found["revision"],
                endpoint=os.environ.get("HF_ENDPOINT"),
            )
        _noted(address, place)
        if not patterns or any(any(Path(place).glob(pattern)) for pattern in patterns):
            return os.path.join(place, file) if file else place
    if file:
        raise UserError(f"{address}: the repository has no such file")
    names = ", ".join(patterns[0] for patterns in WEIGHTS)
    raise UserError(f"{address} has no weights under their usual names ({names}); name its file")


def dataset_path(address: str) -> str:
    """Returns where the files of a dataset of the hub lie on this machine, which may fetch them.

    Args:
      address: `hf://datasets/USER/REPO[/PATH][@REVISION]`. Without a path, the Parquet files of the
        repository are fetched; with the path of Parquet files, in which `*` and `{split}` may
        stand, these alone; with that of another table the whole folder that holds it, because its
        rows name images.

    Raises:
      UserError: the address is wrong, the repository is not there or holds no such files, or the
        hub cannot be reached.
    """
    place, file = _fetched_dataset(address)
    return os.path.join(place, file) if file else place


@functools.cache
def _fetched_dataset(address: str) -> tuple[str, str]:
    found = _parts(PREFIX + address.removeprefix(DATASETS), DATASETS)
    file = found["file"] or ""
    wanted = file.replace("{split}", "*") or "*.parquet"
    if not wanted.endswith(".parquet"):
        wanted = os.path.join(os.path.dirname(wanted), "*")
    library = _library(address)
    with _explained(library, address):
        place = library.snapshot_download(
            found["repo"],
            repo_type="dataset",
            allow_patterns=["dataset_info*.json", wanted],
            revision=found["revision"],
            endpoint=os.environ.get("HF_ENDPOINT"),
        )
    _noted(address, place)
    if not any(Path(place).glob(wanted if file else f"**/{wanted}")):
        raise UserError(f"{address}: the repository has no files {wanted}")
    return place, file


def with_file(address: str, name: str) -> str:
    """Returns the address of a file of a repository, from that of the repository."""
    repository, at, revision = address.partition("@")
    return f"{repository}/{name}{at}{revision}"


def repository_of(address: str) -> str:
    """Returns the USER/REPO of an address. Raises `UserError` if the address is wrong."""
    return _parts(address)["repo"]


def revision_of(address: str) -> str:
    """Returns the branch, tag or commit of an address; "" if it names none."""
    return _parts(address)["revision"] or ""


def _parts(address: str, prefix: str = PREFIX) -> re.Match[str]:
    found = _NAME.fullmatch(address.removeprefix(PREFIX)) if address.startswith(PREFIX) else None
    if not found:
        raise UserError(
            f"{address}: write {prefix}USER/REPO, {prefix}USER/REPO/FILE, or either with @REVISION"
            " at its end"
        )
    return found


@contextlib.contextmanager
def _explained(library: types.ModuleType, address: str) -> Iterator[None]:
    """Turns the exceptions of the library, its connections and files into a `UserError`."""
    try:
        yield
    except Exception as error:
        raise UserError(f"{address}: {_reason(library, error)}") from error


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
        (
            (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled),
            "the hub cannot be reached, and the files have not been fetched before; download the"
            " repository elsewhere and give the folder",
        ),
    )
    for kinds, reason in reasons:
        if isinstance(error, kinds):
            return reason
    cause = f" ({first_line(error.__cause__)})" if error.__cause__ else ""
    # Transfers by the protocol Xet use other servers, and the library does not try plain HTTP when
    # they fail.
    by_xet = any("xet" in frame.name for frame in traceback.extract_tb(error.__traceback__))
    advice = "; if its protocol Xet does not get through, set HF_HUB_DISABLE_XET=1" * by_xet
    return f"huggingface_hub says: {first_line(error)}{cause}{advice}"


def upload(folder: Path, address: str, *, private: bool = False) -> str:
    """Uploads the files of a folder to a repository, and returns the commit.

    A repository that does not exist is created. One commit adds all files and deletes those files
    of an earlier upload that hold or describe another model. If it fails, nothing has changed.

    Args:
      address: `hf://USER/REPO`, or `hf://USER/REPO@BRANCH`. A branch that does not exist is
        created.
      private: whether a new repository is private. If False, the default of its owner decides.

    Raises:
      UserError: the address is wrong, the hub cannot be reached or refuses, or `private` is True
        and the repository exists and is public. No commit has been made then.
    """
    found = _parts(address)
    if found["file"]:
        raise UserError(f"{address}: write {PREFIX}USER/REPO, or {PREFIX}USER/REPO@BRANCH")
    repo, branch, library = found["repo"], found["revision"], _library(address)
    api = library.HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
    with _explained(library, address):
        api.create_repo(repo, private=private or None, exist_ok=True)
        is_public = private and not api.repo_info(repo).private
    if is_public:
        raise UserError(f"{address} is there already and is public; nothing was uploaded")
    with _explained(library, address):
        if branch:
            api.create_branch(repo, branch=branch, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            revision=branch,
            commit_message="Upload a model of vit_jax",
            delete_patterns=[*_OF_AN_EARLIER_PUSH],
        )
    return str(commit.oid)
