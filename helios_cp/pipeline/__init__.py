"""A request becomes a stream of chunks, on one rank or on many."""
