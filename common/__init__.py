"""The maths and the data: what server and nodes share. Needs torch, NumPy and pydantic; knows nothing of Flower but in `wire`."""

__version__ = "0.1.0"
