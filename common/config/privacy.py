"""Settings of differential privacy at the level of a task; `server_app/federation/privacy.py` does what they say."""

from pydantic import Field

from quickbloom.common.options import Options

LEAST_CLIP, MOST_CLIP = 1e-12, 1e12
"""Of a clipping norm that adapts: at 0 nodes would not clip at all, and beyond, squares of numbers leave float32."""


class PrivacyOptions(Options):
    """With `noise-multiplier` above 0 the model is differentially private with respect to every training task."""

    noise_multiplier: float = Field(
        0.0, ge=0, le=1e6, description="deviation of the noise on a round's sum, in units of `clip`; 0: no privacy"
    )
    clip: float = Field(
        0.0,
        ge=0,
        le=MOST_CLIP,
        description="a task's meta-gradient is scaled down to this norm; what to begin with if it adapts",
    )
    delta: float = Field(1e-5, gt=0, lt=1, description="of (epsilon, delta): well below 1 / number of training tasks")
    epsilon: float = Field(0.0, ge=0, description="budget: training ends before it is exceeded; 0: none")
    clip_quantile: float = Field(0.0, ge=0, lt=1, description="adapt `clip` to this quantile of the tasks' norms; 0: keep it")
    clip_rate: float = Field(0.2, gt=0, le=10, description="how fast `clip` adapts, in powers of e for a round")
    noise_seed: int = Field(
        -1, ge=-1, description="for tests alone: noise that anybody can repeat; -1: from the operating system, never the same"
    )

    @property
    def on(self) -> bool:
        return self.noise_multiplier > 0
