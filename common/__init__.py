"""The maths and the data: what server and nodes share. Only `wire` knows of Flower."""

__version__ = "0.1.0"
