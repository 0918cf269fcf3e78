"""The command `python -m helios_cp.generate`: flags become a checked call, a call becomes files."""
