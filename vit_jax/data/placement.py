"""The position of a prepared image in the image file from which it was made."""

import dataclasses

import numpy as np

NOT_SEEN = 255
"""The label of pixels that preprocessing removed; in segmentations it means "not labeled"."""


@dataclasses.dataclass(frozen=True)
class Placement:
    """A map from positions in a prepared image to positions in its file: `scale * y + origin`.

    Positions are measured between pixels: the first pixel extends from 0 to 1.

    Attributes:
      scale, origin: vertical and horizontal; the scale in file pixels for each prepared pixel.
      size: (height, width) of the file's image in pixels.
    """

    scale: tuple[float, float]
    origin: tuple[float, float]
    size: tuple[int, int]

    def after(self, first: "Placement") -> "Placement":
        """Returns the composition of two placements: a map to the file of `first`.

        The file of this placement is the prepared image of `first`.
        """
        (high, wide), (top, left) = first.scale, first.origin
        return Placement(
            (high * self.scale[0], wide * self.scale[1]),
            (high * self.origin[0] + top, wide * self.origin[1] + left),
            first.size,
        )

    def boxes(self, boxes: np.ndarray, frame: np.ndarray) -> np.ndarray:
        """Returns boxes `[n, 4]` of a prepared image as shares of the file's height and width.

        Args:
          boxes: (y0, x0, y1, x1) as shares of the sides `frame`.
          frame: (height, width) in prepared pixels.
        """
        scale, origin = np.tile(self.scale, 2), np.tile(self.origin, 2)
        moved = (boxes * np.tile(frame, 2) * scale + origin) / np.tile(self.size, 2)
        corners = moved.reshape(-1, 2, 2)  # Preprocessing may have mirrored the image.
        return np.concatenate([corners.min(1), corners.max(1)], axis=-1).astype(np.float32)

    def labels(self, labels: np.ndarray) -> np.ndarray:
        """Returns labels `[h, w]` of a prepared image for the pixels of the file, of shape `size`.

        Each pixel gets the label of the prepared pixel that contains its center, or `NOT_SEEN` if
        no prepared pixel does.
        """
        rows, columns = (
            np.floor((np.arange(side) + 0.5 - origin) / scale).astype(int)
            for side, origin, scale in zip(self.size, self.origin, self.scale, strict=True)
        )
        inside = [
            (numbers >= 0) & (numbers < side)
            for numbers, side in zip((rows, columns), labels.shape, strict=True)
        ]
        clipped = [
            np.clip(numbers, 0, side - 1)
            for numbers, side in zip((rows, columns), labels.shape, strict=True)
        ]
        found = labels[np.ix_(*clipped)]
        return np.where(np.logical_and.outer(*inside), found, NOT_SEEN).astype(labels.dtype)
