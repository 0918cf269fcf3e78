"""Groups of ranks on this machine, real or silent."""
