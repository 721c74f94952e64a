"""One small rule per operator, by kind of operator. Importing this folder registers them all."""

from dpm_cli.graph.rules import (  # noqa: F401  each registers its rules
    convolutions,
    elementwise,
    joining,
    making,
    norms,
    products,
    rearranging,
    reductions,
    views,
)
from dpm_cli.graph.rules.registry import NO_RULE, Call, apply_rule

__all__ = ["NO_RULE", "Call", "apply_rule"]
