"""Programs that spread Helios over a Ray cluster."""
