"""A node's computation in a round: the algorithm and its model built from settings, mapped over tasks."""
