"""Describe every event of a run in one plain line."""

import itertools

from dpm_cli.display import numbers
from dpm_cli.events import (
    EpochEnded,
    Event,
    Exported,
    Note,
    PhaseBegan,
    Resumed,
    RoundStarted,
    Started,
    UnitsRemoved,
    WeightsCut,
    WentBack,
)


def describe(event: Event) -> str | None:
    """Describe an event in one line. Returns None for steps, checkpoints and other events that need no line."""
    match event:
        case Started():
            return _describe_start(event)
        case Resumed(stage=stage, step=step, path=path):
            return f"resumed in stage {stage} after step {step}, from {path}"
        case EpochEnded(stage=stage, epoch=epoch, epochs=epochs):
            return f"{stage} {epoch}/{epochs}  " + "  ".join(readings(event))
        case RoundStarted():
            return _describe_round(event)
        case UnitsRemoved(round=number, removed=removed, released=released):
            return f"round {number}  {removed} units removed, {released} released  now {_costs(event)}"
        case WentBack(culprit=culprit, validation_accuracy=accuracy, floor=floor):
            broken = f"validation {numbers.percent(accuracy)} is below {numbers.percent(floor)}"
            return f"{culprit} broke the accuracy floor: {broken}  back to {_costs(event)}"
        case WeightsCut():
            return _describe_cut(event)
        case Exported(path=path, max_difference=difference):
            return f"exported {path}  agrees {numbers.agreement(difference)}"
        case PhaseBegan(what=what):
            return what
        case Note(text=text):
            return f"note: {text}"
        case _:
            return None


def _describe_start(event: Started) -> str:
    target, dense = event.target, event.dense
    if target.limit is None:
        kinds = itertools.cycle(target.kind.split(" and "))  # one of all amounts, or one of each
        wanted = ", ".join(map(numbers.asked, kinds, target.asked))
    else:
        wanted = f"≤ {numbers.cost(target.kind, target.limit)}"
    return (
        f"{event.arch or 'model'}  {numbers.count(dense.macs)} MACs  {numbers.count(dense.params)} parameters  "
        f"{dense.channels} units  target {target.kind} {wanted}  {event.device} {event.precision}"
    )


def _describe_round(event: RoundStarted) -> str:
    planned = f"round {event.round}/{event.rounds}"
    if event.condemning:
        return f"{planned}  units start to decay as soon as they are condemned"
    extra = " to meet the target" if event.round > event.rounds else ""
    return (
        f"{planned}  {event.chosen} units start to decay{extra}  leads to {numbers.count(event.predicted_macs)} MACs, "
        f"{numbers.count(event.predicted_params)} parameters"
    )


def _describe_cut(event: WeightsCut) -> str:
    accuracies = {
        "trained": event.dense,
        "cut": event.cut,
        "recovered": event.recovered,
        "recalibrated": event.recalibrated,
    }
    measured = [f"{name} {numbers.percent(value)}" for name, value in accuracies.items() if value is not None]
    return f"cut to sparsity {event.reached:.3f}  {numbers.size(event.bytes)}  " + "  ".join(measured)


def _costs(event: UnitsRemoved | WentBack) -> str:
    """Say what is left."""
    return f"{numbers.count(event.macs)} MACs, {numbers.count(event.params)} parameters"


def readings(epoch: EpochEnded) -> list[str]:
    """List the measurements of an epoch, the most useful first."""
    accuracy = epoch.validation_accuracy
    return [
        f"loss {epoch.loss:.3f}",
        *([] if accuracy is None else [f"validation {numbers.percent(accuracy, 1)}"]),
        f"lr {epoch.lr:.2g}",
        f"{epoch.images_per_second:.0f} images/s",
        f"waiting for data {numbers.percent(100 * epoch.waiting_for_data, 0)}",
    ]
