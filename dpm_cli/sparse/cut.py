"""Cut a trained model to a sparsity, and measure the lost accuracy, the recovery and the file size."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from dpm_cli.models.packed import count_packed_bytes
from dpm_cli.recipe.bases import OnTheFly
from dpm_cli.report import SparsityReport
from dpm_cli.sparse.on_the_fly import cut_, measure_sparsity
from dpm_cli.sparse.polarise import Recovery


@dataclass(frozen=True)
class CutModel:
    """Holds a model in which the small weights of some layers are cut."""

    module: nn.Module
    masks: Mapping[str, Tensor]  # by parameter; true where a weight was kept
    report: SparsityReport


def cut_model(
    trained: nn.Module,
    layers: Sequence[str],
    settings: OnTheFly,
    *,
    sparsity: float,
    recalibrate_: Callable[[nn.Module], None] | None,
    score: Callable[[nn.Module], float | None],
    file: str,
) -> CutModel:
    """Cut a copy, with and without recovery, and measure both. recalibrate_: recomputes BatchNorm statistics."""

    def cut(how: Recovery) -> tuple[nn.Module, dict[str, Tensor]]:
        module = copy.deepcopy(trained)
        return module, cut_(module, layers, sparsity=sparsity, threshold=settings.threshold, how=how, per=settings.per)

    after_cut = score(cut("none")[0])
    module, masks = cut(settings.recover)
    recovered, recalibrated = score(module), None
    if recalibrate_:
        recalibrate_(module)
        recalibrated = score(module)
    return CutModel(
        module,
        masks,
        SparsityReport(
            asked=sparsity,
            reached=measure_sparsity(masks),
            bytes=count_packed_bytes(module, masks),
            dense=score(trained),
            cut=after_cut,
            recovered=recovered,
            recalibrated=recalibrated,
            file=file,
        ),
    )
