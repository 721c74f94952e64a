import numpy as np
import pytest
import torch
from PIL import Image

from dpm_cli.data.fit import fit_pixels, fit_statistics

PHOTO = torch.randint(256, (2, 3, 12, 20), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_fitting_images_leave_unchanged() -> None:
    assert torch.equal(fit_pixels(PHOTO, (3, 12, 20)), PHOTO)


def test_grey_is_what_pil_calls_grey() -> None:
    grey = fit_pixels(PHOTO, (1, 12, 20))
    expected = np.asarray(Image.fromarray(PHOTO[1].permute(1, 2, 0).numpy()).convert("L"))
    assert np.abs(grey[1, 0].numpy().astype(int) - expected).max() <= 1


@pytest.mark.parametrize("size", [(6, 6), (24, 24), (5, 11)])
def test_short_side_is_scaled_and_the_centre_kept(size: tuple[int, int]) -> None:
    columns = torch.arange(20, dtype=torch.uint8).mul(10).expand(1, 3, 12, 20)  # 0 to 190, left to right
    fitted = fit_pixels(columns, (3, *size))
    assert fitted.shape == (1, 3, *size)
    assert float(fitted.float().mean()) == pytest.approx(95, abs=5)  # symmetric about the centre


def test_statistics_are_repeated_or_weighted() -> None:
    assert fit_statistics((0.3,), 3) == (0.3, 0.3, 0.3)
    assert fit_statistics((0.1, 0.2, 0.3), 3) == (0.1, 0.2, 0.3)
    assert fit_statistics((0.5, 0.5, 0.5), 1) == pytest.approx((0.5,))
