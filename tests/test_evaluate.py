import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mobileqat.errors import DataError
from mobileqat.evaluate import accuracy, per_class, top1


def test_counts_the_largest_output():
    outputs = np.array([[1, 9, 3], [7, 2, 1], [0, 1, 8]], np.int8)
    assert top1(outputs, np.array([0, 0, 0])).tolist() == [1, 0, 2]
    assert accuracy(outputs, np.array([1, 0, 0])) == pytest.approx(2 / 3)


def test_the_first_of_equal_outputs_counts():
    assert top1(np.array([[5, 5], [-128, -128]], np.int8), np.array([0, 1])).tolist() == [0, 0]


def test_classes_are_scored_apart_and_those_without_samples_left_out():
    outputs = np.eye(3, dtype=np.float32)[[0, 1, 0, 2]]
    assert per_class(outputs, np.array([0, 0, 0, 2]), ("cat", "dog", "owl")) == [
        {"class": "cat", "accuracy": pytest.approx(2 / 3), "samples": 3},
        {"class": "owl", "accuracy": 1.0, "samples": 1},
    ]


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=50))
def test_accuracy_is_the_mean_of_the_classes_weighted_by_samples(pairs):
    predicted, labels = np.array(pairs).T
    rows = per_class(np.eye(4)[predicted], labels, ("a", "b", "c", "d"))
    assert sum(row["samples"] for row in rows) == len(labels)
    mean = sum(row["accuracy"] * row["samples"] for row in rows) / len(labels)
    assert accuracy(np.eye(4)[predicted], labels) == pytest.approx(mean)


@pytest.mark.parametrize("share", [1.0, 0.1, 1e-30])
def test_a_scale_does_not_change_accuracy(share):
    outputs, labels = np.random.default_rng(0).normal(size=(50, 4)), np.arange(50) % 4
    assert accuracy(outputs * share, labels) == accuracy(outputs, labels)


@pytest.mark.parametrize(
    ("outputs", "labels", "problem"),
    [
        (np.zeros((3, 2)), [0, 1], "for 2 labels. Received: shape (3, 2)"),
        (np.zeros(3), [0, 0, 0], "Received: shape (3,)"),
        (np.zeros((2, 4, 4, 3)), [0, 1], "Received: shape (2, 4, 4, 3)"),
        (np.zeros((2, 3)), [0, 3], "Labels go up to 3, but the model has 3 outputs"),
        (np.zeros((0, 3)), np.zeros(0, int), "no sample to score"),
        (np.array([[1.0, 0.0], [np.nan, 1.0]]), [0, 1], "1 of 2 samples are NaN, first of sample 1"),
    ],
)
def test_what_cannot_be_scored_is_refused(outputs, labels, problem):
    with pytest.raises(DataError) as raised:
        accuracy(outputs, np.asarray(labels))
    assert problem in str(raised.value)
