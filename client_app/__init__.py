"""The node's side of a run: answer the roll call, compute meta-gradients, score held-out tasks."""
