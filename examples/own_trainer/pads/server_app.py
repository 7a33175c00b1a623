"""The ServerApp: quickbloom's rounds, with this app's network."""

from pads.task import Net
from quickbloom.server import own_server

app = own_server(Net)
