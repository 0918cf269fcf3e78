"""A library of parallelism for diffusion transformers. It knows nothing of Helios."""
