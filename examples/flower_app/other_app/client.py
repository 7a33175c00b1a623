"""The ClientApp: quickbloom's own. An algorithm or a data set of this app would be registered here and in server.py."""

from quickbloom.client_app.app import app

__all__ = ["app"]
