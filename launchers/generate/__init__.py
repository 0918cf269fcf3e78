"""The command `python -m launchers.generate`: the flags of `helios_cp.generate`, on a Ray cluster."""
