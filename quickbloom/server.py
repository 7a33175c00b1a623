"""The ServerApp, where Flower looks for it.

Flower loads ServerApp and ClientApp in two threads of a simulation. Python looks for a submodule as soon as its package is
there, also while another thread still runs the package's `__init__`, and then misses the folders beside `quickbloom`. This
module lies in the package's own folder, and the first import waits until the package is whole.
"""

import quickbloom  # noqa: F401
from quickbloom.server_app import app as _app
from quickbloom.server_app import own_app as _own

app = _app.app
own_server = _own.own_server
