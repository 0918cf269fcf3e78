"""The live server: from prompt to picture, what it adds to a chunk, and how many may watch."""
