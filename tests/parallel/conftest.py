"""Fixtures of the multi-rank tests."""

import pytest

from benchmarks.ranks.pool import RankPool, shared_pool


@pytest.fixture(scope="session")
def ranks() -> RankPool:
    """The pool of gloo ranks that all tests of the session share."""
    return shared_pool()
