"""From noise to the latents of one chunk, in plain functions."""
