"""Mathematics, data, models and messages shared by the server and the nodes."""
