"""Say how large the paired benchmark is: its dense nets, images, epochs, budgets and seeds."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Net:
    """How a dense net is trained, on all images."""

    epochs: int
    seed: int


@dataclass(frozen=True)
class Scale:
    """How much of it fits the machine."""

    arch: str
    images: int | None
    nets: tuple[Net, ...]
    epochs: int
    decay_steps: int
    budgets: tuple[float, ...]
    seeds: int


SCALES = {
    "cpu": Scale("resnet20", 10_000, (Net(10, 77), Net(7, 0)), epochs=6, decay_steps=70, budgets=(0.25, 0.5), seeds=5),
    # As "cpu", but in a third of the time. For depgraph: the ticks and tocks of gate-decorator take longer.
    "cpu-short": Scale(
        "resnet20", 10_000, (Net(10, 77), Net(7, 0)), epochs=2, decay_steps=70, budgets=(0.25, 0.5), seeds=5
    ),
    # As "cpu", but the slim nets train on all images, as their teachers did; one of these was trained long.
    "cpu-all": Scale(
        "resnet20", None, (Net(10, 77), Net(7, 0), Net(30, 5)), epochs=6, decay_steps=200, budgets=(0.25,), seeds=1
    ),
    # For a folder with 10 000 training images: teachers trained long on what their pupils see, and nothing else.
    "cpu-few": Scale("resnet20", 10_000, (Net(60, 3), Net(30, 4)), epochs=6, decay_steps=70, budgets=(0.25,), seeds=5),
    "rehearsal": Scale("resnet20", 128, (Net(1, 0),), epochs=4, decay_steps=1, budgets=(0.5,), seeds=1),
    "rehearsal-vit": Scale("small_vit:small_vit", 128, (Net(1, 0),), epochs=4, decay_steps=1, budgets=(0.5,), seeds=1),
    "gpu": Scale(
        "resnet56", None, (Net(160, 0), Net(80, 77)), epochs=60, decay_steps=1000, budgets=(0.47, 0.25), seeds=5
    ),
    "gpu-vgg16": Scale(
        "vgg16_bn", None, (Net(160, 0), Net(80, 77)), epochs=60, decay_steps=1000, budgets=(0.265, 0.1), seeds=5
    ),
    # For a GPU that is lent for minutes; --epochs says how many fit.
    "gpu-short": Scale("resnet56", None, (Net(20, 0),), epochs=10, decay_steps=1000, budgets=(0.47, 0.25), seeds=5),
    "gpu-short-vgg16": Scale(
        "vgg16_bn", None, (Net(20, 0),), epochs=10, decay_steps=1000, budgets=(0.265, 0.1), seeds=5
    ),
    "gpu-short-vit": Scale(
        "small_vit:small_vit", None, (Net(20, 0),), epochs=10, decay_steps=1000, budgets=(0.5, 0.25), seeds=5
    ),
}
