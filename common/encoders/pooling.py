"""From the states of a sequence to the features of one example."""

from typing import Any

import torch
from torch import Tensor


def pooled(states: Tensor, mask: Tensor | None, how: str) -> Tensor:
    """Return [n, size] from the states [n, length, size] of a sequence, or [n, channels, height, width] of a picture.

    `mask` [n, length]: 1 for tokens, 0 for padding; None: all are tokens. `how`: "mean" over the tokens, "class" for the
    first, "last" for the last that is no padding. A picture's states are averaged. [n, size] stays as it is.
    """
    if states.ndim == 2:
        return states
    if states.ndim == 4:
        return states.mean(dim=(2, 3))
    if how == "class":
        return states[:, 0]
    if mask is None:
        return states[:, -1] if how == "last" else states.mean(dim=1)
    if how == "last":
        places = torch.arange(mask.shape[1], device=mask.device)
        return states[torch.arange(len(states)), (places * (mask > 0)).amax(dim=1)]
    weights = mask.to(states.dtype).unsqueeze(-1)
    return (states * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)


def of_sentence_transformers(pooling: dict[str, Any]) -> str:
    """Return how a directory of sentence-transformers pools, from its `1_Pooling/config.json`; "" for an unknown way."""
    ways = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "class", "pooling_mode_lasttoken": "last"}
    on = [name for name, value in pooling.items() if name.startswith("pooling_mode") and value is True]
    named = {"mean": "mean", "cls": "class", "lasttoken": "last"}.get(str(pooling.get("pooling_mode", "")), "")
    return ways.get(on[0], "") if len(on) == 1 else "" if on else named
