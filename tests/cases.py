"""Cases of parametrized tests."""

import pytest


def others_slow(cases, quick):
    """Return the cases for `pytest.mark.parametrize`; those that are not in the collection `quick` run as slow tests only."""
    return [
        pytest.param(*(case if isinstance(case, tuple) else [case]), marks=() if case in quick else pytest.mark.slow)
        for case in cases
    ]
