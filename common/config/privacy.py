"""Settings of task-level differential privacy, implemented in `server_app/federation/private/privacy.py`."""

from typing import Literal

from pydantic import Field

from quickbloom.common.options import Options

LEAST_CLIP, MOST_CLIP = 1e-12, 1e12
"""Range of an adaptive clipping norm: at 0 nodes would not clip, and above the maximum squares overflow float32."""


class PrivacyOptions(Options):
    """Settings of differential privacy with respect to every training task; on if `noise-multiplier` is above 0."""

    noise_multiplier: float = Field(
        0.0, ge=0, le=1e6, description="deviation of the noise on a round's sum, in units of `clip`; 0: no privacy"
    )
    clip: float = Field(
        0.0,
        ge=0,
        le=MOST_CLIP,
        description="largest norm of a task's meta-gradient, scaled down if above; the first value if it adapts",
    )
    centre_noise: float = Field(
        0.0,
        ge=0,
        le=1e6,
        description="deviation of the noise on the sum of the tasks' means of an encoder's features, in units of the largest "
        "norm of one, before the first round; 0: features are not centred",
    )
    noise: Literal["independent", "tree"] = Field(
        "independent",
        description="independent: new noise in every round, on a secret sample of the tasks; tree: the correlated noise of "
        "DP-FTRL, with nothing claimed of sampling: every task takes part once in an epoch, in a round that its name decides",
    )
    delta: float = Field(1e-5, gt=0, lt=1, description="of (epsilon, delta): well below 1 / number of training tasks")
    epsilon: float = Field(0.0, ge=0, description="privacy budget: training ends before it is exceeded; 0: none")
    clip_quantile: float = Field(0.0, ge=0, lt=1, description="adapt `clip` to this quantile of the tasks' norms; 0: keep it")
    clip_rate: float = Field(0.2, gt=0, le=10, description="how fast `clip` adapts, in powers of e for a round")
    noise_seed: int = Field(
        -1, ge=-1, description="for tests only: noise that can be reproduced; -1: noise from the operating system"
    )

    @property
    def on(self) -> bool:
        return self.noise_multiplier > 0
