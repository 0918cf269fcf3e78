"""Unit: what commands leave out of the libraries that they import."""

from __future__ import annotations

import importlib.util
import sys

import pytest

from helios_cp.config.imports import without


def test_left_out_packages_are_neither_found_nor_imported(tmp_path, monkeypatch):
    (tmp_path / "heavy_package.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    with without(("heavy_package", "pytest")):
        assert importlib.util.find_spec("heavy_package") is None
        with pytest.raises(ImportError):
            import heavy_package
        assert sys.modules["pytest"] is pytest, "what is imported already stays"
    import heavy_package

    assert sys.modules.pop("heavy_package") is heavy_package
