"""A reward that can be cheated, for the over-optimisation runs of docs/claims.py.

How much of the image has the colours that the prompt asks for. At first that makes the right objects, and clearer; what
has most of it in the end is an image filled with colour, in which the checker of the embedded world finds nothing.
"""

import torch

from shapes import world

NEAR = 0.25
"""RGB distance below which a pixel counts as of a colour."""


def colour(images, prompts):
    """images: (B, 3, H, W) in [0, 1]. Returns (B,): the share of pixels of an asked colour, 0 to 1."""
    shares = []
    for image, prompt in zip(images.float(), prompts, strict=True):
        asked = {name for name, _ in world.parse(prompt).objects}
        palette = torch.tensor([world.COLOURS[name] for name in sorted(asked)], device=image.device) / 255
        distance = (image[None] - palette[:, :, None, None]).norm(dim=1)  # (colours, H, W)
        shares.append((distance.amin(dim=0) < NEAR).float().mean())
    return torch.stack(shares)
