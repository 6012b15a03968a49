"""How near one batch of pictures is to another: PSNR and SSIM, one figure per picture."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

PSNR_CEILING = 100.0
"""dB. Pictures that differ by rounding alone count as this, so that means stay finite."""
WINDOW, SPREAD = 11, 1.5
K1, K2 = 0.01, 0.03


def psnr(pictures: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB `[N]` of pictures `[N, H, W, 3]` in 0..1, at most `PSNR_CEILING`."""
    error = (pictures - reference).double().square().flatten(1).mean(dim=1)
    return (-10 * error.log10()).clamp_max(PSNR_CEILING).float()


def ssim(pictures: Tensor, reference: Tensor) -> Tensor:
    """Structural similarity `[N]` of pictures `[N, H, W, 3]` in 0..1, the mean over the colours.

    Wang et al. 2004: Gaussian window of 11 x 11 with a standard deviation of 1.5, K1 = 0.01, K2 = 0.03.
    """
    offset = torch.arange(WINDOW, dtype=torch.float64) - WINDOW // 2
    line = torch.exp(-(offset**2) / (2 * SPREAD**2))
    line = line / line.sum()

    def local_mean(values: Tensor) -> Tensor:
        planes = values.flatten(0, 1)[:, None]
        return F.conv2d(F.conv2d(planes, line.view(1, 1, -1, 1)), line.view(1, 1, 1, -1)).unflatten(0, values.shape[:2])

    x, y = (each.double().permute(0, 3, 1, 2) for each in (pictures, reference))
    mean_x, mean_y = local_mean(x), local_mean(y)
    variance_x, variance_y = local_mean(x * x) - mean_x**2, local_mean(y * y) - mean_y**2
    covariance = local_mean(x * y) - mean_x * mean_y
    c1, c2 = K1**2, K2**2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance + c2) / (variance_x + variance_y + c2)
    return (luminance * structure).flatten(1).mean(dim=1).float()
