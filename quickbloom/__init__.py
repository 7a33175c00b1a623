"""Federated meta-learning on Flower: a model that fits each user, from data that stay on their devices."""

from pathlib import Path

__version__ = "0.1.0"

# Installed, the folders `common`, `server_app` and `client_app` lie in here. In a source tree and in a Flower bundle they lie
# beside this folder, as Flower's apps have it.
if not Path(__file__).with_name("common").is_dir():
    __path__.append(str(Path(__file__).resolve().parent.parent))
