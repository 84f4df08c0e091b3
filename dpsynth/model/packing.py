"""Images as the net sees them: cells of pixels become channels of one position, so that it works on far fewer positions."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from dpsynth.config import packing


@dataclass(frozen=True)
class Packing:
    """Packing of images with these sides for a net that halves its input levels - 1 times. Sides that do not fit are padded."""

    sides: tuple[int, ...]
    levels: int

    @property
    def factor(self) -> int:
        """Pixels per axis of a cell."""
        return packing(self.sides)

    def channels(self, of_image: int) -> int:
        """Channels of a position, for images of so many."""
        return int(of_image * self.factor ** len(self.sides))

    def pack(self, images: Tensor) -> Tensor:
        """(n, channel, *sides) to (n, channels, *positions)."""
        grid = self.factor * 2 ** (self.levels - 1)
        ends = [end for side in reversed(self.sides) for end in (0, -side % grid)]
        return space_to_depth(F.pad(images, ends, mode="replicate") if any(ends) else images, self.factor)

    def unpack(self, packed: Tensor) -> Tensor:
        """Inverse of `pack`."""
        inside = (slice(None), slice(None), *(slice(side) for side in self.sides))
        return depth_to_space(packed, self.factor)[inside]


def space_to_depth(images: Tensor, factor: int) -> Tensor:
    """(n, c, *space) to (n, c * factor^d, *space/factor): nothing is lost, and the net works on far fewer positions."""
    n, c, *space = images.shape
    split = images.reshape(n, c, *(part for side in space for part in (side // factor, factor)))
    d = len(space)
    order = (0, 1, *(3 + 2 * axis for axis in range(d)), *(2 + 2 * axis for axis in range(d)))
    return split.permute(order).reshape(n, c * factor**d, *(side // factor for side in space)).contiguous()


def depth_to_space(packed: Tensor, factor: int) -> Tensor:
    """Inverse of `space_to_depth`."""
    n, c, *space = packed.shape
    d = len(space)
    split = packed.reshape(n, c // factor**d, *(factor for _ in space), *space)
    order = (0, 1, *(index for axis in range(d) for index in (2 + d + axis, 2 + axis)))
    return split.permute(order).reshape(n, c // factor**d, *(factor * side for side in space)).contiguous()
