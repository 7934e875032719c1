"""Tar files in the layout of WebDataset: the members `KEY.jpg`, `KEY.cls`, `KEY.json` are a sample.

    config.data.source = "webdataset"
    config.data.name = "shards/{split}-*.tar"               # or "shards/{000000..000015}.tar"

The label is the content of `KEY.cls`, or the value `label` in `KEY.json`. Shards are read at random
through an index. Batches are therefore a function of seed and step, as from any other source.
`vit-jax prepare 'shards/*.tar'` writes the indices beside the shards; without it, they are built
when the shards are first opened, and kept in `~/.cache/vit_jax`. An index that `wds2idx` of NVIDIA
DALI wrote (`NAME.idx`) saves reading all headers. Everything else is as in the source `table`.
"""

import os
from collections.abc import Callable

from vit_jax.data.sources import _table_names, _tar_index, table


class Source(table.Source):
    """Reads the samples of a split; the arguments are those of the source `table`."""


def prepare(name: str, tell: Callable[[str], None]) -> str:
    """Writes the index of each tar file that `name` stands for, in all splits.

    Returns the folder of the files.

    Raises:
      UserError: there is no such file, one is damaged, or an index cannot be written.
    """
    paths, _ = _table_names.find_files(name.replace("{split}", "*"), "")
    _tar_index.prepare(paths, tell)
    return os.path.dirname(paths[0]) or "."
