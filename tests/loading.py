"""A transformer alone, for tests that exchange no adapters."""

from __future__ import annotations

from typing import Any

from helios_cp.model.transformer import HeliosTransformer
from helios_cp.weights.transformer import load_adaptable


def load_transformer(*given: Any, **options: Any) -> HeliosTransformer:
    return load_adaptable(*given, **options)[0]
