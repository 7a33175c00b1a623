"""Settings of a run and of a node, and the pages and tables generated from them."""
