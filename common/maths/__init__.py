"""What the algorithms compute with: parameters, batches, inner loops and the fast paths of both."""
