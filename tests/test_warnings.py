"""pyproject's filterwarnings: a warning of our own making fails, a library's does not."""

import warnings

import pytest


def warn_from(module: str, category=UserWarning, message="something new") -> None:
    """Raise a warning that Python attributes to the module of that name."""
    warnings.warn_explicit(message, category, f"/{module.replace('.', '/')}.py", 1, module)


@pytest.mark.parametrize("module", ["kernels", "model.gpt", "pipeline.training.loop", __name__])
@pytest.mark.parametrize("category", [UserWarning, DeprecationWarning, FutureWarning])
def test_our_own_warnings_are_errors(module, category):
    with pytest.raises(category, match="something new"):
        warn_from(module, category)


def test_a_librarys_warning_is_shown_and_one_that_is_named_is_not():
    known = "Apex is not installed. Falling back to Torch Norm"
    with pytest.warns(UserWarning) as seen:
        warn_from("models", message="something new")
        warn_from("megatron.core", message="something new")
    assert len(seen) == 2
    with warnings.catch_warnings(record=True) as shown:
        warn_from("megatron.core", message=known)
    assert not shown
