"""The maths, the data and the messages: what server and nodes share."""
