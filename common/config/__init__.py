"""Settings: of a run, of a node, and the pages and tables that are written from them."""
