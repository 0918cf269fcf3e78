"""Measurements of this project, run from the checkout: `python -m benchmarks.forward`."""

from helios_cp.config.imports import quiet_imports

quiet_imports()
