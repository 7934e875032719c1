"""The numbers behind figures of results, as tables and as words for those who cannot see them."""

from collections.abc import Sequence

import numpy as np

_MOST_MISTAKES = 5
"""The most wrong classes that a row of `confusions` names."""


def confusions(matrix: np.ndarray, class_names: Sequence[str]) -> list[list[str]]:
    """Returns a row for each true class: its images, its recall and what it was taken for.

    Args:
      matrix: `[classes, classes]` counts, true class by predicted class.
      class_names: names in class order.
    """
    rows = [["true class", "images", "recall", "predicted instead (images)"]]
    for number, counts in enumerate(matrix):
        total, order = counts.sum(), np.argsort(-counts, kind="stable")
        wrong = [i for i in order.tolist() if counts[i] and i != number]
        shown = [f"{class_names[i]} ({counts[i]:,})" for i in wrong[:_MOST_MISTAKES]]
        if len(wrong) > _MOST_MISTAKES:
            shown.append(f"{len(wrong) - _MOST_MISTAKES} more classes")
        recall = f"{counts[number] / total:.1%}" if total else ""
        rows.append([class_names[number], f"{total:,}", recall, ", ".join(shown)])
    return rows


def confusions_in_words(matrix: np.ndarray, class_names: Sequence[str]) -> str:
    """Returns the arguments of `confusions` as one sentence, with the most frequent mistake."""
    right, total = int(np.trace(matrix)), int(matrix.sum())
    words = f"Confusion matrix of {len(matrix)} classes: {right:,} of {total:,} images are right"
    wrong = np.where(np.eye(len(matrix), dtype=bool), 0, matrix)
    if not wrong.any():
        return f"{words}."
    true, predicted = divmod(int(wrong.argmax()), len(matrix))
    return (
        f"{words}. The most frequent mistake is {class_names[true]} predicted as"
        f" {class_names[predicted]}: {wrong.max():,} of the images."
    )


def reliability(count: np.ndarray, accuracy: np.ndarray) -> list[list[str]]:
    """Returns a row for each bin of confidence that has images: its images and their accuracy.

    Args:
      count: the number of images in each of the bins, which divide 0..1 evenly, `[bins]`.
      accuracy: the share of them that is classified correctly, `[bins]`; NaN in empty bins.
    """
    edges = np.linspace(0, 1, len(count) + 1)
    return [
        ["confidence", "images", "accuracy"],
        *(
            [f"{low:.0%} to {high:.0%}", f"{number:,.0f}", f"{share:.1%}"]
            for low, high, number, share in zip(edges, edges[1:], count, accuracy, strict=False)
            if number
        ),
    ]
