"""Read and check recipes: YAML files that belong to the user."""

from dpm_cli.recipe.annotate import annotate_recipe, dump_schema, point_to_schema
from dpm_cli.recipe.code import is_own_code, require_trust
from dpm_cli.recipe.reader import dump_recipe, hash_recipe, load_recipe, parse_recipe, read_recipe, shipped_recipes
from dpm_cli.recipe.schema import Recipe
from dpm_cli.recipe.sections import Training
from dpm_cli.recipe.values import ExportFormat, Section

__all__ = [
    "ExportFormat",
    "Recipe",
    "Section",
    "Training",
    "annotate_recipe",
    "dump_recipe",
    "dump_schema",
    "hash_recipe",
    "is_own_code",
    "load_recipe",
    "parse_recipe",
    "point_to_schema",
    "read_recipe",
    "require_trust",
    "shipped_recipes",
]
