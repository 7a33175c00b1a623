"""Starts a run and follows it to its end."""
