"""Messages between server and nodes; only this package names record fields."""
