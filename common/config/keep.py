"""What `keep = "auto"` means for a run."""

from quickbloom.common.config.run import RunConfig
from quickbloom.common.datasets.base import DataSpec
from quickbloom.common.datasets.own import is_encoded
from quickbloom.common.models import MODELS


def wants_best(config: RunConfig, spec: DataSpec) -> bool:
    """Return whether the run is to end with its best model.

    With "auto" that is so where the model before the first round can do something already, so that
    training may make it worse.
    """
    if config.keep != "auto":
        return config.keep == "best"
    model = MODELS.get("transformer" if config.model == "auto" and spec.tokens else config.model)
    return is_encoded(spec) or bool(config.weights) or (model is not None and model.pretrained)
