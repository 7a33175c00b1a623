"""A Ray cluster that is running: its machines do the runs of a comparison, or compute the nodes of one run."""
