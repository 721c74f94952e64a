"""Write and read ExecuTorch programs (.pte) whose operators XNNPACK runs, for phones and other small devices."""

from pathlib import Path

import torch
from torch import Tensor, nn

from dpm_cli.errors import ModelFileError, RunError, one_line
from dpm_cli.export.exported import ExportedModel
from dpm_cli.export.noise import quiet
from dpm_cli.layers.modes import plain_attention

LARGEST_BATCH = 8  # memory is planned for it


def serialise(module: nn.Module, example: Tensor) -> bytes:
    """Lower a module (eval mode, on the CPU) with an example (B >= 2, C, H, W). Raises RunError if it cannot be."""
    with quiet(), torch.no_grad(), plain_attention():
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower

        try:
            dynamic = ({0: torch.export.Dim("batch", max=LARGEST_BATCH)},)
            program = torch.export.export(module, (example,), dynamic_shapes=dynamic)
            lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
            return bytes(lowered.to_executorch().buffer)
        except Exception as error:  # the model itself has run before, so this is the exporter's problem
            raise RunError(f"ExecuTorch cannot lower the model: {one_line(error, root_cause=True)}") from error


def read(path: Path) -> ExportedModel:
    """Open a program in ExecuTorch's Python runtime. Raises ModelFileError if it cannot be run."""
    try:
        with quiet():
            from executorch.runtime import Runtime, Verification

            program = Runtime.get().load_program(path, verification=Verification.InternalConsistency)
            method = program.load_method("forward")
        assert method is not None
        channels, height, width = method.metadata.input_tensor_meta(0).sizes()[1:]
    except Exception as error:  # a damaged file can upset the reader in any way
        raise ModelFileError(
            f"{path} is no program that ExecuTorch can run ({one_line(error, root_cause=True)})"
        ) from None

    def outputs(images: Tensor) -> list[Tensor]:
        try:
            parts = [
                [output.clone() for output in method.execute([part.contiguous()])]
                for part in torch.split(images.detach().cpu(), LARGEST_BATCH)
            ]
            return [torch.cat(pieces) for pieces in zip(*parts)]
        except Exception as error:  # its exceptions share no base class
            raise RunError(
                f"{path} fails on images of shape {tuple(images.shape)}: {one_line(error, root_cause=True)}"
            ) from error

    return ExportedModel("executorch", path, {}, (channels, height, width), outputs, lambda _: (None, None))
