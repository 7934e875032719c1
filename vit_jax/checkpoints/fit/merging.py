"""Fitting a checkpoint's arrays to a model: every array is accounted for, or it is an error."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import numpy as np

from vit_jax import models
from vit_jax.checkpoints.fit import surgery
from vit_jax.checkpoints.fit.options import Options, any_match
from vit_jax.checkpoints.fit.report import MergeReport
from vit_jax.checkpoints.fit.target import Target, split_table
from vit_jax.checkpoints.weights import (
    CLS,
    DECODED,
    DECODER,
    PATCHES,
    POSITIONS,
    TEXT_HEAD,
    Weights,
    count_blocks,
)
from vit_jax.errors import UserError

HEAD = ("head/kernel", "head/bias")
HIDDEN = ("head/pre_logits/kernel", "head/pre_logits/bias")

_VITAL = re.compile(r"(^|[/.])(\w*norm\w*|\w*bias\w*|patch_embed)([/.]|$)")
"""Names of arrays that are never left out: norms, biases and the patch embedding."""

_UNTOLD = ("position", "num_heads")
"""Fields that are None in `Weights.fields` where the file does not tell them."""

MAX_NAMES = 6
"""Names that an error lists."""


class Merge:
    """One fitting under way: `arrays` become the model's, and each change is written down.

    Steps for single kinds of array come first and leave the shapes that the model wants; `finish`
    compares all names and shapes.
    """

    def __init__(self, weights: Weights, target: Target, options: Options, source: str):
        self.weights = weights
        self.target = target
        self.options = options
        self.source = source
        self.arrays = dict(weights.arrays)
        self.fresh: set[str] = set()
        self.resized: dict[str, str] = {}
        self.initialised: list[str] = []
        self.ignored = list(weights.ignored)
        self.notes = list(weights.notes)

    def run(self) -> tuple[dict[str, np.ndarray], MergeReport]:
        """All steps, in order. Raises `UserError` where something stays unexplained."""
        self.compare_fields()
        self.shape_attention()
        self.check_width()
        self.fit_patches()
        self.fit_tokens()
        self.fit_offsets()
        self.fit_block_positions()
        self.fit_decoder_positions()
        self.fit_head()
        self.leave_other_tasks()
        self.apply_patterns()
        return self.finish()

    def error(self, message: str) -> UserError:
        return UserError(f"{self.source}: {message}")

    def drop(self, name: str, reason: str) -> None:
        if self.arrays.pop(name, None) is not None:
            self.ignored.append(f"{name}: {reason}")

    def make(self, name: str, value: np.ndarray | None, origin: str) -> None:
        """Fills a parameter that the file lacks; `value` None: as training from scratch would."""
        if value is None:
            self.fresh.add(name)
            self.arrays.pop(name, None)
        else:
            self.arrays[name] = value.astype(np.float32)
        self.initialised.append(f"{name}: {origin}")

    def compare_fields(self) -> None:
        """Notes where the model computes something else with the same arrays."""
        told = {k: v for k, v in self.weights.fields.items() if not (v is None and k in _UNTOLD)}
        model = self.target.model
        self._compare_tower("model", told, models.backbone_of(model))
        text = models.text_tower_of(model)
        if text is not None:
            self._compare_tower("text tower", self.weights.text_fields, text)

    def _compare_tower(self, what: str, told: Mapping[str, Any], tower: nn.Module) -> None:
        own = models.fields_of(tower)
        both = {**own, **{key: value for key, value in told.items() if key in own}}, own
        theirs, mine = map(models.effective_fields, both)
        changed = sorted(k for k in theirs.keys() & mine.keys() if theirs[k] != mine[k])
        if changed:
            lists = [
                ", ".join(f"{key}={side[key]!r}" for key in changed) for side in (theirs, mine)
            ]
            self.notes.append(f"its own {what} has {lists[0]}; yours has {lists[1]}")

    def shape_attention(self) -> None:
        """Splits channels into the model's heads where the file does not tell their number.

        Keys and values that several queries share (Ainslie et al. 2023, GQA) are repeated where the
        model has them once for each query: the same is computed.
        """
        for name, array in self.arrays.items():
            shape = self.target.shapes.get(name)
            flat_ndim = 2 if name.endswith("/kernel") else 1
            if shape and "/attn/" in name and array.ndim == flat_ndim < len(shape):
                merged = (-1, shape[-1]) if "/out/" in name else (shape[0], -1)
                wanted = np.broadcast_to(0, shape).reshape(merged if flat_ndim == 2 else -1).shape
                if array.shape == wanted:
                    self.arrays[name] = array.reshape(shape)
                elif array.shape[-1] and re.search("/attn/(key|value)/", name):
                    self._repeat_heads(name, array, shape)

    def _repeat_heads(self, name: str, array: np.ndarray, shape: tuple[int, ...]) -> None:
        heads, head_dim = shape[-2:]
        held, rest = divmod(array.shape[-1], head_dim)
        if rest or held >= heads or heads % held:
            return
        split = array.reshape(*array.shape[:-1], held, head_dim)
        self.arrays[name] = np.repeat(split, heads // held, axis=-2)
        self.resized[name] = f"{held} heads, each repeated {heads // held} times"

    def check_width(self) -> None:
        """A checkpoint of another size of model fails here, before a hundred names are listed."""
        name = "backbone/norm/scale"
        wanted, found = self.target.shapes.get(name), self.arrays.get(name)
        if wanted and found is not None and found.ndim == 1 and found.shape != wanted:
            raise self.error(
                f"a model of width {found.shape[-1]}, but yours has {wanted[-1]}; build the size "
                "that the checkpoint was trained with"
            )
        depths = [count_blocks(names) for names in (self.arrays, self.target.shapes)]
        if depths[0] != depths[1]:
            raise self.error(
                f"a model of depth {depths[0]}, but yours has {depths[1]}; write depth={depths[0]}"
            )

    def fit_patches(self) -> None:
        """Patches of another size, images of another number of channels."""
        wanted, kernel = self.target.shapes.get(PATCHES), self.arrays.get(PATCHES)
        if not wanted or kernel is None or kernel.ndim != 4 or kernel.shape == wanted:
            return
        if kernel.shape[3] != wanted[3] or "backbone/stem/root/conv/kernel" in self.target.shapes:
            return  # `finish` reports the mismatch
        changed = surgery.adapt_channels(kernel, wanted[2])
        changed = surgery.resize_patches(changed, wanted[:2])
        self.arrays[PATCHES] = changed
        self.resized[PATCHES] = f"{list(kernel.shape)} to {list(wanted)}"

    def fit_tokens(self) -> None:
        """The class token and the positions: see `surgery`."""
        table = self.arrays.pop(POSITIONS, None)
        if table is None:
            self._fit_class_token(None)
            return
        row, patches = self._split(table)
        row = self._fit_class_token(row)
        wanted = self.target.shapes.get(POSITIONS)
        if wanted is None:
            self._expect_fixed_positions(patches)
            return
        if patches.shape[2] != wanted[2]:
            raise self.error(f"positions {list(table.shape)}, but the model wants {list(wanted)}")
        new = self._resize_positions(patches)
        if self.target.class_row:
            first = np.zeros((1, 1, wanted[2]), np.float32) if row is None else row
            new = np.concatenate([first, new], axis=1)
        self.arrays[POSITIONS] = new
        if new.shape != table.shape and POSITIONS not in self.resized:
            held = "with" if self.target.class_row else "without"
            self.resized[POSITIONS] = f"now {held} the class token's row"

    def _split(self, table: np.ndarray) -> tuple[np.ndarray | None, np.ndarray]:
        if table.ndim != 3 or table.shape[0] != 1:
            raise self.error(f"positions have shape {list(table.shape)}, not [1, tokens, width]")
        return split_table(
            self.weights,
            table,
            class_token=CLS in self.target.shapes,
            class_row=self.target.class_row,
            num_patches=self.target.num_patches,
        )

    def _fit_class_token(self, row: np.ndarray | None) -> np.ndarray | None:
        """Makes `cls` what the model wants; returns the row of the table that goes with it."""
        if CLS not in self.target.shapes:
            self.drop(CLS, "the model has no class token")
            if row is not None:
                self.ignored.append(f"{POSITIONS} row 0: the class token's position")
            return None
        if CLS not in self.arrays:
            if row is None:
                zeros = np.zeros(self.target.shapes[CLS], np.float32)
                self.make(CLS, zeros, "zeros; the checkpoint has no class token")
            else:
                self.arrays[CLS] = row
                self.resized[CLS] = "taken from the first row of the positions"
            return None
        if row is not None and self.arrays[CLS].shape != row.shape:
            raise self.error(f"{CLS} is {list(self.arrays[CLS].shape)}, not {list(row.shape)}")
        if row is not None and not self.target.class_row:
            self.arrays[CLS] = self.arrays[CLS] + row
        if row is not None and np.any(row) and not self.target.class_row:
            self.resized[CLS] = "its position added to it"
        return row

    def _expect_fixed_positions(self, patches: np.ndarray) -> None:
        """A table may stand in the file for positions that the model computes."""
        if not np.any(patches):
            self.ignored.append(f"{POSITIONS}: zeros, which are no positions")
            return
        position = self.target.traits.position
        side = surgery.square_side(patches.shape[1])
        grid = self.weights.grid or (side and (side, side))
        if position.startswith("sincos2d") and grid and patches.shape[2] % 4 == 0:
            fixed = surgery.sincos_table(grid, patches.shape[2], position)
            if np.allclose(patches, fixed, atol=1e-5):
                self.ignored.append(f"{POSITIONS}: the sin-cos table that the model computes")
                return
        raise self.error(
            f"the checkpoint has learned positions, but the model has position={position!r}; write "
            "position='learned'"
        )

    def _resize_positions(self, patches: np.ndarray) -> np.ndarray:
        new, count = self.target.grid, self.target.num_patches
        given = self.weights.grid
        if given and given[0] * given[1] != patches.shape[1]:
            raise self.error(
                f"a source grid of {given[0]}x{given[1]} is not {patches.shape[1]} positions"
            )
        if new is None:
            if patches.shape[1] != count:
                raise self.error(f"{patches.shape[1]} positions, but the model has {count}")
            return patches
        try:
            old = given or surgery.infer_grid(patches.shape[1], new)
        except UserError as error:
            raise self.error(str(error)) from error
        how = self.options.interpolation
        how = self.weights.interpolation if how == "auto" else how
        if old != new:
            sizes = f"{old[0]}x{old[1]} to {new[0]}x{new[1]}"
            self.resized[POSITIONS] = f"{sizes}, {how}"
        keeps_aspect = self.weights.keeps_aspect
        return surgery.resize_positions(patches, old, new, how, keeps_aspect=keeps_aspect)

    def fit_offsets(self) -> None:
        """Resizes tables of relative positions; see `surgery.resize_bias`."""
        new, how = self.target.grid, self.weights.bias_interpolation
        for name, old in self._of_other_grid("/position_bias/table", 0, lambda n: 2 * n - 1):
            assert new is not None
            self.arrays[name] = surgery.resize_bias(self.arrays[name], old, new, how)
            self.resized[name] = f"{old[0]}x{old[1]} to {new[0]}x{new[1]}, {how}"

    def fit_block_positions(self) -> None:
        """Resizes positions that blocks add, of which the last rows are those of patches."""
        new, how = self.target.grid, self.weights.interpolation
        for name, old in self._of_other_grid("/positions", 1, lambda n: n):
            assert new is not None
            first, rest = np.split(self.arrays[name], [-old[0] * old[1]], axis=1)
            table = surgery.resize_positions(rest, old, new, how)
            self.arrays[name] = np.concatenate([first, table], axis=1)
            self.resized[name] = f"{old[0]}x{old[1]} to {new[0]}x{new[1]}, {how}"

    def fit_decoder_positions(self) -> None:
        """Makes the table of a masked autoencoder's decoder, which is fixed, for another grid."""
        wanted, found = self.target.shapes.get(DECODED), self.arrays.get(DECODED)
        if wanted and found is not None and found.shape[1:2] != wanted[1:2]:
            self.make(DECODED, None, "the fixed sines and cosines of another grid")

    def _of_other_grid(
        self, ending: str, axis: int, side: Callable[[int], int]
    ) -> Iterator[tuple[str, surgery.Grid]]:
        """Yields the tables with a name of this ending for another grid, and that grid.

        side: the places along a side of n patches; axis: that of the places. A grid that the file
        does not tell is a square, or that of the model where the number of places is the model's.
        """
        new = self.target.grid
        if new is None:
            return
        for name in [n for n in self.target.shapes if n.endswith(ending) and n in self.arrays]:
            count, wanted = (
                shape[axis] if len(shape) > axis else 0
                for shape in (self.arrays[name].shape, self.target.shapes[name])
            )
            extra = wanted - side(new[0]) * side(new[1])
            edge = surgery.square_side(max(count - extra, 0)) or 0
            square = next((n for n in range(1, edge + 1) if side(n) == edge), 0)
            old = self.weights.grid or (new if count == wanted else (square, square))
            if old != new and side(old[0]) * side(old[1]) + extra == count:
                yield name, old

    def fit_head(self) -> None:
        """Keeps the classifier where it fits and is wanted; else starts it anew, at zero."""
        target = self.target.shapes
        if HEAD[0] not in target:
            self._start_other_head()
            return
        reason = self._head_misfit()
        if self.options.head == "keep" and reason:
            raise self.error(f"the head cannot be kept: {reason}; write head='auto' or 'zero'")
        if HIDDEN[0] not in target:
            for name in HIDDEN:
                self.drop(name, "the model has no representation layer")
        elif HIDDEN[0] not in self.arrays:
            for name in HIDDEN:
                self.make(name, None, "the checkpoint has no representation layer")
        if self.options.head == "zero" or reason:
            for name in HEAD:
                self.drop(name, reason or "head='zero'")
            kernel = np.zeros(target[HEAD[0]], np.float32)
            bias = np.full(target[HEAD[1]], self.target.model.head_bias_init, np.float32)
            self.make(HEAD[0], kernel, "zeros, a new head")
            self.make(HEAD[1], bias, "head_bias_init, a new head")

    def _start_other_head(self) -> None:
        """A bare backbone needs no head; that of another task starts as the model makes it."""
        for name in (*HEAD, *HIDDEN):
            if name not in self.target.shapes:
                self.drop(name, "the model has no such head")
        anew = self.options.head == "zero" and TEXT_HEAD not in self.target.shapes
        other = self.target.shapes.keys() - self.fresh
        names = sorted(name for name in other if not name.startswith("backbone/"))
        misfits = self._misfits(names)
        for name in names:
            misfit = misfits.get(name.partition("/")[0])
            if anew:
                self.make(name, None, "head='zero'")
            elif name not in self.arrays and self.options.head == "keep":
                raise self.error(f"the head cannot be kept: there is no {name} in the checkpoint")
            elif name not in self.arrays:
                self.make(name, None, "not in the checkpoint")
            elif misfit:
                self.make(name, None, misfit)

    def _misfits(self, names: Sequence[str]) -> dict[str, str]:
        """Returns why parts of the head start anew: one of their arrays has another shape.

        With head='keep' no part may start anew, with head='zero' all do anyway, and a model of two
        towers has no such heads: then there is nothing to return.
        """
        if self.options.head != "auto" or TEXT_HEAD in self.target.shapes:
            return {}
        shapes = {name: self.arrays[name].shape for name in names if name in self.arrays}
        return {
            name.partition("/")[0]: f"a new head; {name} of the checkpoint is {list(shape)}"
            for name, shape in shapes.items()
            if shape != self.target.shapes[name]
        }

    def leave_other_tasks(self) -> None:
        """Drops decoders, and text towers of our own checkpoints, that this model does not have."""
        kept = ("backbone/", "head") if self.weights.ours else ()
        for name in [*self.arrays]:
            of_other = not name.startswith(kept) if kept else name.startswith(DECODER)
            if of_other and name not in self.target.shapes:
                self.drop(name, "of another task")

    def _head_misfit(self) -> str:
        """Returns why the checkpoint's head means nothing in this model; empty if it does."""
        target = self.target.shapes
        if any(name not in self.arrays for name in HEAD):
            return "the checkpoint has none"
        if (HIDDEN[0] in self.arrays) != (HIDDEN[0] in target):
            return "only one of the two has a representation layer before it"
        classes = self.arrays[HEAD[1]].size
        if classes != target[HEAD[1]][0]:
            return f"it has {classes} classes, the model {target[HEAD[1]][0]}"
        return ""

    def apply_patterns(self) -> None:
        """Drops arrays and makes parameters anew where the patterns of the caller ask for it."""
        for name in [*self.arrays]:
            if name not in self.target.shapes and any_match(self.options.ignore, name):
                self.drop(name, "asked for by `ignore`")
        for name in self.target.shapes:
            if any_match(self.options.initialise, name):
                self.drop(name, "asked for by `initialise`")
                self.make(name, None, "asked for by `initialise`")

    def finish(self) -> tuple[dict[str, np.ndarray], MergeReport]:
        """The arrays of the model and the account of them."""
        target = self.target.shapes
        unknown = [n for n in self.weights.unknown if not any_match(self.options.ignore, n)]
        asked = sorted(set(self.weights.unknown) - set(unknown))
        self.ignored += [f"{name}: asked for by `ignore`" for name in asked]
        extra = sorted({*(self.arrays.keys() - target.keys()), *unknown})
        missing = sorted(target.keys() - self.arrays.keys() - self.fresh)
        common = sorted(target.keys() & self.arrays.keys())
        wrong = [
            f"{name} is {list(self.arrays[name].shape)} and should be {list(target[name])}"
            for name in common
            if self.arrays[name].shape != target[name]
        ]
        wrong += [
            f"{name} holds {self.arrays[name].dtype}, not floating-point numbers"
            for name in common
            if self.arrays[name].dtype != np.float32
        ]
        self._refuse(extra, missing, wrong)
        made = {line.partition(":")[0] for line in self.initialised}
        loaded = [name for name in common if name not in self.resized and name not in made]
        values = self.arrays | self.target.initialize(self.fresh, self.options.seed)
        report = MergeReport(
            source=self.source,
            format=self.weights.format,
            loaded=tuple(loaded),
            resized=tuple(f"{name}: {how}" for name, how in self.resized.items()),
            initialised=tuple(self.initialised),
            ignored=tuple(self.ignored),
            notes=tuple(self.notes),
        )
        return {name: values[name] for name in target}, report

    def _refuse(self, extra: list[str], missing: list[str], wrong: list[str]) -> None:
        parts = []
        if extra:
            parts.append(f"holds {_listed(extra)}, which the model has no place for")
        if missing:
            parts.append(f"lacks {_listed(missing)}")
        if wrong:
            parts.append(_listed(wrong))
        if parts:
            advice = ", or name what may be left out with ignore= and initialise="
            if any(_VITAL.search(name) for name in (*extra, *missing)):
                advice = ""  # Without them the model computes something else, and nobody sees it.
            raise self.error(
                f"{'; '.join(parts)}. Build the model that the checkpoint was trained as{advice}"
            )


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return ", ".join(names[:MAX_NAMES]) + more
