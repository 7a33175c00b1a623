"""Training without rounds that wait: who works when, and what becomes a step."""
