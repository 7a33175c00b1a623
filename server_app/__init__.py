"""What runs on the server: roll call, rounds, outer optimizer, run directory; and the `quickbloom` command."""

import sys
from importlib.util import find_spec
from pathlib import Path

# Folders of the user's with these names, on PYTHONPATH say, must not be taken for ours.
_PACKAGES, _ROOT = ("common", "client_app", "server_app"), Path(__file__).resolve().parent.parent
if any((found := find_spec(name)) is None or Path(found.origin or "").resolve().parent.parent != _ROOT for name in _PACKAGES):
    sys.path.insert(0, str(_ROOT))
