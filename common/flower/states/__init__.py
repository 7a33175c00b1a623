"""What quickbloom changes in the tables that Flower's SuperLink and SuperNode keep: of nodes, tasks and messages."""
