"""Other machines that do the runs of a comparison."""
