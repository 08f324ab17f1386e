"""The comparison that other tests rely on: what passes it and what does not."""

import pytest
import torch

from tests.closeness import assert_close_by_norm, relative_error

X = torch.tensor([3.0, 4.0])


def test_the_error_is_the_norm_of_the_difference_over_that_of_the_expected():
    assert relative_error(X + torch.tensor([0.0, 0.5]), X) == 0.1
    assert relative_error([3, 4.5], [3, 4]) == 0.1
    assert relative_error(1e-8, -1e-8) == 2
    # Computed in float64: in float16 these squares overflow, in float32 the difference is lost.
    assert relative_error((100 * X).half(), (100 * X).half()) == 0
    assert 0 < relative_error(X.double() * (1 + 1e-12), X) < 2e-12
    assert relative_error(torch.zeros(2), torch.zeros(2)) == 0


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_what_is_not_finite_is_never_close(wrong):
    x = torch.tensor([3.0, wrong])
    for actual, expected in ((x, X), (X, x), (x, x)):
        assert relative_error(actual, expected) == float("inf")
        with pytest.raises(AssertionError, match="result: relative error inf"):
            assert_close_by_norm(actual, expected, 1e9)
    assert relative_error(X, torch.zeros(2)) == float("inf")


def test_the_measured_error_and_the_shapes_are_named():
    assert_close_by_norm(X * 1.1, X, 0.11)
    with pytest.raises(AssertionError, match="LSE: relative error 1.00e-01, must be at most 9e-02"):
        assert_close_by_norm(X * 1.1, X, 0.09, "LSE")
    with pytest.raises(AssertionError, match=r"\(1, 2\) != \(2,\)"):
        relative_error(X[None], X)
