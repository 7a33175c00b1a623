"""Encoders of pictures by their name in `timm`, without the classifier, prepared as their configuration says.

Weights come from the user's own cache of the hub. They are fetched only where the user's settings ask for it,
HF_HUB_OFFLINE=0; else a model that is not there is one sentence.
"""

import os
from typing import Any

from quickbloom.common.encoders.base import Encoder
from quickbloom.common.encoders.module import ModuleEncoder
from quickbloom.common.encoders.pictures import Normalising
from quickbloom.common.errors import ConfigError, in_one_line
from quickbloom.common.system.extras import needs


def load(name: str, pooling: str) -> Encoder:
    """Return the pretrained model `name` as an encoder. Raises ConfigError."""
    fetches = os.environ.get("HF_HUB_OFFLINE", "1").casefold() in ("0", "no", "false", "off")
    if not fetches:
        os.environ["HF_HUB_OFFLINE"] = "1"  # read when the hub's library is imported
    timm: Any = needs("images", "timm", f"`encoder=timm:{name}`")
    try:
        model = timm.create_model(name, pretrained=True, num_classes=0)
        config = timm.data.resolve_model_data_config(model)
    except Exception as error:  # the library and the hub raise a dozen types
        mend = "" if fetches else ": fetch it once with HF_HUB_OFFLINE=0 in the environment"
        raise ConfigError(f"the encoder 'timm:{name}' cannot be loaded ({in_one_line(error)}){mend}") from None
    channels, side = config["input_size"][0], config["input_size"][1]
    resize = round(side / config.get("crop_pct", 1.0))
    return ModuleEncoder(
        model, f"timm:{name}", pooling, Normalising(side, resize, channels, tuple(config["mean"]), tuple(config["std"]))
    )
