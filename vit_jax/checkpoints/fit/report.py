"""The account of every array when a checkpoint was loaded into a model."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class MergeReport:
    """An account of a load. Names are ours, with blocks numbered (`backbone/blocks_3/norm1/scale`).

    source: the file. format: how its arrays are named, in words.
    loaded: taken over as they are. resized: taken over changed, with what was done.
    initialised: not in the file, with where their values come from.
    ignored: in the file, not in the model, with the reason.
    notes: what else may make results differ from the file's origin.
    """

    source: str
    format: str
    loaded: tuple[str, ...] = ()
    resized: tuple[str, ...] = ()
    initialised: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"{self.source}: {self.format}, {len(self.loaded)} arrays loaded as they are"]
        for what in ("resized", "initialised", "ignored", "notes"):
            lines += [f"  {what}: {line}" for line in getattr(self, what)]
        return "\n".join(lines)
