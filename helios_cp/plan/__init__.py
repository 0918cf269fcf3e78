"""The command `python -m helios_cp.plan`: counts become seconds, seconds become a choice of layout."""
