"""What travels between server and nodes: the only place that names record fields."""
