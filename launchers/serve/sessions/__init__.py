"""Live sessions: their states, pacing, recordings on disk, and the queue."""
