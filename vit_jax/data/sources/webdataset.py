"""Tar files in the layout of WebDataset: the members `KEY.jpg`, `KEY.cls`, `KEY.json` are a sample.

    config.data.source = "webdataset"
    config.data.name = "shards/{split}-*.tar"

The label is the content of `KEY.cls`, or the value `label` in `KEY.json`. Shards are read at random
through an index, which is built once and kept beside each of them (`NAME.tar.vit_jax_index.npz`).
Batches are therefore a function of seed and step, as from any other source. Everything else is as
in the source `table`.
"""

from vit_jax.data.sources import table


class Source(table.Source):
    """Reads the samples of a split; the arguments are those of the source `table`."""
