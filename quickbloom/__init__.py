"""Federated meta-learning on Flower: a model that fits each user, from data that stay on their devices.

`run` and `compare` train here, `advise` says what to deploy. `load`, `adapt`, `predict`, `explain` and `score` use what was
trained.
`register` adds an algorithm, a data set or a model of your own. Nothing is imported before it is used.

Example: `quickbloom.run("maml", data="hospitals.csv", task="hospital", target="outcome").per_task`
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quickbloom.client_app.offline.adapting import adapt
    from quickbloom.client_app.offline.explaining import explain
    from quickbloom.client_app.offline.files import one_model as load
    from quickbloom.client_app.offline.predicting import predict
    from quickbloom.client_app.offline.scoring import score
    from quickbloom.common.algorithms.base import Algorithm
    from quickbloom.common.datasets.base import Dataset
    from quickbloom.common.errors import QuickbloomError, RunError
    from quickbloom.common.models.base import Model
    from quickbloom.server_app.federation.strategy import MetaStrategy
    from quickbloom.session import Run, advise, compare, register, run

__version__ = "0.2.0"
__all__ = [
    "Algorithm",
    "Dataset",
    "MetaStrategy",
    "Model",
    "QuickbloomError",
    "Run",
    "RunError",
    "adapt",
    "advise",
    "compare",
    "explain",
    "load",
    "predict",
    "register",
    "run",
    "score",
]

# Installed, the folders `common`, `server_app` and `client_app` lie in here. In a source tree and in a Flower bundle they lie
# beside this folder, as Flower's apps have it.
if not Path(__file__).with_name("common").is_dir():
    __path__.append(str(Path(__file__).resolve().parent.parent))

_PUBLIC = {
    "Algorithm": "common.algorithms.base:Algorithm",
    "Dataset": "common.datasets.base:Dataset",
    "MetaStrategy": "server_app.federation.strategy:MetaStrategy",
    "Model": "common.models.base:Model",
    "QuickbloomError": "common.errors:QuickbloomError",
    "Run": "session:Run",
    "RunError": "common.errors:RunError",
    "adapt": "client_app.offline.adapting:adapt",
    "advise": "session:advise",
    "compare": "session:compare",
    "explain": "client_app.offline.explaining:explain",
    "load": "client_app.offline.files:one_model",
    "predict": "client_app.offline.predicting:predict",
    "register": "session:register",
    "run": "session:run",
    "score": "client_app.offline.scoring:score",
}


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = _PUBLIC[name].partition(":")
    return getattr(import_module(f"{__name__}.{module}"), attribute)


def __dir__() -> list[str]:
    return sorted([*_PUBLIC, *(name for name in globals() if name.startswith("__"))])
