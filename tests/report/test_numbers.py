"""The tables and sentences behind figures say what the figures show."""

import numpy as np

from vit_jax.report import numbers


def test_confusions_have_the_recall_and_the_mistakes_of_each_class():
    matrix = np.array([[7, 1, 2], [0, 0, 0], [0, 0, 1000]])
    assert numbers.confusions(matrix, ("cat", "dog", "cow")) == [
        ["true class", "images", "recall", "predicted instead (images)"],
        ["cat", "10", "70.0%", "cow (2), dog (1)"],
        ["dog", "0", "", ""],
        ["cow", "1,000", "100.0%", ""],
    ]
    many = numbers.confusions(np.eye(9, dtype=int)[::-1] + 1, [*"abcdefghi"])
    assert many[1][3] == "i (2), b (1), c (1), d (1), e (1), 3 more classes"


def test_a_sentence_names_the_most_frequent_mistake():
    matrix = np.array([[7, 3], [1, 9]])
    found = numbers.confusions_in_words(matrix, ("cat", "dog"))
    assert found.startswith("Confusion matrix of 2 classes: 16 of 20 images are right. ")
    assert found.endswith(" mistake is cat predicted as dog: 3 of the images.")
    perfect = numbers.confusions_in_words(np.diag([7, 9]), ("cat", "dog"))
    assert perfect.endswith("16 of 16 images are right.")


def test_a_bin_of_confidence_without_images_has_no_row():
    found = numbers.reliability(np.array([4.0, 0.0]), np.array([0.25, np.nan]))
    assert found == [["confidence", "images", "accuracy"], ["0% to 50%", "4", "25.0%"]]
