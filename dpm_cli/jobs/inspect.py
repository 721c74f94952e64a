"""`dpm inspect`: show the plan without training."""

from dataclasses import replace
from pathlib import Path

from dpm_cli.engine.device import choose_device
from dpm_cli.errors import UsageError
from dpm_cli.jobs.loading import AnyRecipe, load_splits, resolve_recipe
from dpm_cli.jobs.plan import Plan
from dpm_cli.jobs.readiness import Readiness
from dpm_cli.jobs.sensitivity import measure_sensitivity, take_images
from dpm_cli.jobs.starting import AnyModel, load_start
from dpm_cli.results import Inspected, Sensitivity


def inspect(
    model: AnyModel | None,
    recipe: AnyRecipe,
    *,
    sensitivity: float | None = None,
    images: int = 1000,
    device: str = "auto",
    trust: bool = False,
) -> Inspected:
    """Plan without training: groups, layers that stay whole and why, achievable costs, resulting widths, and problems.

    The widths result from choosing all victims at once by the current weights; training will shift some. All that a run
    checks before it trains is checked: data, schedule, exports, free disk. `problems` says what would stop it.
    sensitivity: the share of its units that each group loses, one group at a time, while accuracy and loss are measured
    on `images` validation images.
    """
    recipe = resolve_recipe(recipe, trust=trust)
    if sensitivity is not None and not 0 < sensitivity < 1:
        raise UsageError(f"the share is {sensitivity:g}; it is a fraction of each group's units such as 0.5")
    if images < 1:
        raise UsageError(f"images is {images}; at least one is needed")
    if sensitivity is not None and not recipe.data.labels:
        raise UsageError("the sensitivity is measured with labels, but data.labels is false")
    start = load_start(model, recipe, trust)
    torch_device = choose_device(device)
    plan = Plan(start.module, recipe, torch_device)
    ready = Readiness(recipe, start, torch_device, Path("out"))
    result = replace(
        plan.describe(start.arch),
        code=recipe.code,
        run=ready.run,
        problems=tuple(str(error) for error in ready.errors),
        exit_code=ready.exit_code,
    )
    if sensitivity is not None:
        splits = ready.splits if ready.splits is not None else load_splits(recipe, torch_device)  # or say why not
        held_out = bool(len(splits.validation))
        split, batch = splits.validation if held_out else splits.train, recipe.data.batch
        some = take_images(split, images, batch=batch, seed=recipe.seed)
        dense, rows = measure_sensitivity(
            plan.module.to(torch_device), plan.groups, plan.scores, some, share=sensitivity
        )
        measured = Sensitivity(
            share=sensitivity,
            split="validation" if held_out else "train",
            images=dense.images,
            accuracy=dense.accuracy,
            loss=dense.loss,
            groups=tuple(rows),
        )
        result = replace(result, sensitivity=measured)
    return result
