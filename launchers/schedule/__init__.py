"""Decides who works on what next. Pure Python: knows neither Ray nor torch."""
