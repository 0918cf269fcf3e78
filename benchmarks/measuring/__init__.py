"""Tools for every benchmark: time, memory, counts, the machine, result files."""
