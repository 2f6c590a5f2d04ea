"""Scores as one tidy table, statistics over seeds and test items, and metrics of fields."""
