"""`dpm demo`: train, prune and export a small net, without network or arguments."""

from pathlib import Path

import dpm_cli
from dpm_cli.cli.options import AsJson, Device, OutputFolder, Quiet
from dpm_cli.cli.progress import follow
from dpm_cli.cli.prune import show
from dpm_cli.errors import OutputError

MARKER = ".dpm-demo"  # marks a folder that a demo made, so that the next one may overwrite it
RECIPE = "digits"


def demo(
    output: OutputFolder = Path("dpm-demo"),
    device: Device = "auto",
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Train, prune and export a small net, in a minute.

    It learns the bundled handwritten digits: no network, no arguments.
    """
    claim(output)
    import torch

    torch.set_num_threads(1)  # in so small a net, threads would mostly wait for each other
    settings = dpm_cli.load_recipe(RECIPE)
    dense = output / "dense.pt"
    with follow(quiet=quiet, as_json=as_json) as tell:
        dpm_cli.train(settings, output=dense, device=device, overwrite=True, on_event=tell)
        report = dpm_cli.prune(dense, settings, output=output, device=device, overwrite=True, on_event=tell)
    show(report, as_json=as_json)
    if not as_json and not quiet:
        from dpm_cli.display.facts import praise

        print(f"\n{praise(report)} Look at {output / 'report.html'}.")
        print("Next, with images of your own in a folder per class: dpm init --data FOLDER")


def claim(folder: Path) -> None:
    """Create the folder, or reuse that of an earlier demo. Raises OutputError if anything else is there."""
    marker = folder / MARKER
    try:
        if folder.exists() and not (folder.is_dir() and (marker.exists() or not any(folder.iterdir()))):
            raise OutputError(f"{folder} exists and is not an earlier demo's folder: choose another --output")
        folder.mkdir(parents=True, exist_ok=True)
        marker.touch()
    except OSError as error:
        raise OutputError(f"{folder} cannot be used: {error.strerror}; choose another --output") from None
