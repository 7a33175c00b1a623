"""The ClientApp, where Flower looks for it.

Flower loads ServerApp and ClientApp in two threads of a simulation. Python looks for a submodule as soon as its package is
there, also while another thread still runs the package's `__init__`, and then misses the folders beside `quickbloom`. This
module lies in the package's own folder, and the first import waits until the package is whole.
"""

import quickbloom  # noqa: F401
from quickbloom.client_app import app as _app
from quickbloom.client_app.own_app import app as _own

app = _app.app
own_trainer = _own.own_trainer
