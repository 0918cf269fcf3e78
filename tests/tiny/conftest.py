"""Training needs gradients, which other tests do without."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _gradients(_no_grad):
    with torch.enable_grad():
        yield
