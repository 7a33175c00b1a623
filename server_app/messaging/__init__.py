"""Messages to the nodes and their replies."""
