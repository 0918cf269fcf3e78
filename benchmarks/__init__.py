"""Measurements of this project, run from the checkout: `python -m benchmarks.forward`."""

import helios_cp  # noqa: F401 - first, as it silences what diffusers imports
