"""The live server `python -m launchers.serve`: videos watched and steered while they are made."""
