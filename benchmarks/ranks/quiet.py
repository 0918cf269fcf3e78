"""Imported first by the fork server of ranks, so that what it imports next does not warn of other binaries."""

from helios_cp.config.imports import quiet_imports

quiet_imports()
