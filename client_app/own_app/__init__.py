"""Nodes of somebody's own Flower app: they train with its code, and reply as this project's nodes do."""
