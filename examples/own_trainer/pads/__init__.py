"""A Flower app in the layout of `flwr new`: digits that users write on pads which each of them holds in a way of their own."""
