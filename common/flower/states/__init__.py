"""What quickbloom changes and looks up in the tables of Flower's SuperLink and SuperNode: of nodes, tasks and messages."""
