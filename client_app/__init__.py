"""What runs on a node: it answers the roll call, computes meta-gradients, and scores held-out tasks."""
