"""How floating-point results are compared: by the norm of their difference.

Each processor's BLAS sums in an order of its own, so that a bound on single elements, or a bit for
bit comparison of two orders, holds on one processor and fails on another.
"""

import torch


def relative_error(actual, expected) -> float:
    """||actual - expected|| / ||expected||, computed in float64.

    Args:
        actual: Tensor, or anything that torch.as_tensor accepts.
        expected: Tensor or values of the same shape.

    Returns:
        The error; infinity if either side holds a NaN or an infinity.

    Raises:
        AssertionError: If the shapes differ.
    """
    actual, expected = (torch.as_tensor(x).detach().double() for x in (actual, expected))
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} != {tuple(expected.shape)}"
    error = (actual - expected).norm() / expected.norm()
    if torch.equal(actual, expected) and expected.isfinite().all():
        return 0.0
    return float(error) if error.isfinite() else float("inf")


def assert_close_by_norm(actual, expected, bound: float, name: object = "result") -> None:
    """Assert that relative_error(actual, expected) is at most `bound`; `name` says which result."""
    error = relative_error(actual, expected)
    assert error <= bound, f"{name}: relative error {error:.2e}, must be at most {bound:.0e}"
