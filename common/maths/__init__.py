"""Mathematics of the algorithms: parameters, batches, inner loops and their fast paths."""
