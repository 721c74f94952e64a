"""Find which channels can only go together, predict what their removal saves, and remove them."""

from dpm_cli.graph.compact import compact_, take
from dpm_cli.graph.cost import Cost
from dpm_cli.graph.groups import Group, Groups, Kept, Slice
from dpm_cli.graph.labels import Role
from dpm_cli.graph.rehearsal import find_groups
from dpm_cli.graph.units import Units

__all__ = ["Cost", "Group", "Groups", "Kept", "Role", "Slice", "Units", "compact_", "find_groups", "take"]
