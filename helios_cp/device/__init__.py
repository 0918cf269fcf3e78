"""Devices by name, their memory, their streams and their clocks."""
