"""Define the settings of single base pruners, which other bases ignore."""

from typing import Literal

from pydantic import Field

from dpm_cli.recipe.values import Fraction, LearningRate, Positive, Section


class Otov2(Section):
    """Configures the base `otov2`. `amplify` and `ceiling` default to the reference's values for the optimizer."""

    variant: Literal["dhspg", "hesso"] = Field(default="dhspg", description="how units are chosen and pushed to zero")
    strength: float | None = Field(
        default=None, gt=0, le=1e4, description="of the penalty; null: from the round's length"
    )
    amplify: float | None = Field(
        default=None,
        gt=0,
        le=1e6,
        description="× the penalty that a growing unit needs; null: 2 with SGD, 20 with Adam",
    )
    ceiling: float | None = Field(
        default=None, ge=1, le=1e9, description="largest penalty / strength; null: 10 with SGD, 1000 with Adam"
    )
    epsilon: float = Field(
        default=0.95, ge=0, lt=1, description="a unit is projected if less than this is left along its direction"
    )
    tolerance: Fraction = Field(default=0.05, description="fraction of all units to mark beyond what the target needs")


class Gates(Section):
    """Configures the base `gate-decorator`. `prune.rounds` is the number of ticks; `train` describes one tock."""

    tick_epochs: Positive = Field(
        default=1, description="epochs of one tick, which trains only gates, shifts and classifier"
    )
    tick_lr: LearningRate = Field(default=1e-3, description="learning rate of the ticks")
    ticks_per_tock: Positive = Field(default=10, description="ticks from one tock to the next")
    strength: float = Field(default=1e-3, ge=0, le=100, description="of the L1 penalty on gates during tocks")
    fraction: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="fraction of the gates that a tick masks; null: equal shares of the target",
    )


class OnTheFly(Section):
    """Configures the base `on-the-fly`, which cuts single weights. `prune.keep` names the layers to spare."""

    penalty: Literal["ternary-cosine", "tail-energy"] = Field(
        default="ternary-cosine", description="what pulls weights apart into large ones and small ones"
    )
    strength: float = Field(default=2.0, ge=0, le=100, description="of the penalty, summed over the layers")
    per: Literal["filter", "layer"] = Field(default="filter", description="which weights share a sphere and a mean")
    keep_first: bool = Field(default=True, description="do not cut the first convolution")
    threshold: float | None = Field(
        default=None, gt=0, le=100, description="cut weights below this × RMS, in place of a share; null: a share"
    )
    recover: Literal["none", "mean", "signed-mean", "split-mean"] = Field(
        default="split-mean", description="what takes the place of cut weights"
    )
