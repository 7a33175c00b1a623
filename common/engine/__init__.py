"""A node's share of a round: the algorithm and its model built from settings, mapped over tasks."""
