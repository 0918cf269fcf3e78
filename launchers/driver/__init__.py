"""Runs the chunk pipeline: submits videos, hands out work, restarts workers, writes files."""
