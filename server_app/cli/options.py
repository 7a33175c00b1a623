"""What the help of several commands says alike."""

from quickbloom.common.datasets import DATASETS as _DATASETS

DATASETS = ", ".join(f"{name} (needs files)" if data.needs_files else name for name, data in _DATASETS.items())
