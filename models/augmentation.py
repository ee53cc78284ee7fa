"""Random changes to training images that leave the label alone, drawn for each image."""

import torch
import torch.nn.functional as F
from torch import Tensor


def augment(images: Tensor, shift: int, flip: bool) -> Tensor:
    """Shift and mirror images, each on its own; PyTorch's global generator decides.

    Args:
        images: uint8 [B, C, H, W].
        shift: at most so many pixels up, down, left, right; what comes in is black.
        flip: mirror half of them left to right.

    Returns:
        uint8 [B, C, H, W].
    """
    if flip:
        mirrored = torch.rand(len(images)).lt(0.5).to(images.device)
        images = torch.where(mirrored.view(-1, 1, 1, 1), images.flip(-1), images)
    if shift:
        batch, _, height, width = images.shape
        corner = torch.randint(2 * shift + 1, (2, batch, 1)).to(images.device)
        rows = corner[0] + torch.arange(height, device=images.device)  # [B, H]
        columns = corner[1] + torch.arange(width, device=images.device)  # [B, W]
        padded = F.pad(images, (shift,) * 4)
        image = torch.arange(batch, device=images.device).view(-1, 1, 1)
        shifted = padded.permute(0, 2, 3, 1)[image, rows.unsqueeze(2), columns.unsqueeze(1)]
        images = shifted.permute(0, 3, 1, 2)
    return images
