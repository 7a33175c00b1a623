"""Several runs beside each other: algorithms, seeds, left-out tasks."""
