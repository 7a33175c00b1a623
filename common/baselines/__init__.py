"""Models that need no federation, computed from a task's own rows."""
