"""Between and around blocks: windows, and the step to a smaller grid."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.fuzz.spec import Spec


def windowed(x: Tensor, grid: tuple[int, int], inner: Callable[[Tensor], Tensor]) -> Tensor:
    """Call a function on windows of 2 x 2 tokens, as ViTDet and SAM do; the grid is padded."""
    b, _, c = x.shape
    rows, columns = grid
    y = F.pad(x.view(b, rows, columns, c), (0, 0, 0, columns % 2, 0, rows % 2))
    tall, wide = (rows + 1) // 2, (columns + 1) // 2
    y = y.view(b, tall, 2, wide, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, c)
    y = inner(y).view(b, tall, wide, 2, 2, c).permute(0, 1, 3, 2, 4, 5)
    y = y.reshape(b, 2 * tall, 2 * wide, c)[:, :rows, :columns]
    return y.reshape(b, rows * columns, c)


class Stage(nn.Module):
    """Halves the grid of the tokens, or their row."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.spec, width = spec, spec.width
        flat = spec.source != "vision"
        conv = nn.Conv1d if flat else nn.Conv2d
        self.conv = conv(width, width, 3, stride=2, padding=1)
        self.norm = nn.LayerNorm(4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, _, c = x.shape
        if self.spec.source != "vision":
            y = x.transpose(1, 2)
            y = F.avg_pool1d(y, 2) if self.spec.stage == "pool" else self.conv(y)
            return y.transpose(1, 2)
        rows, columns = self.spec.grid
        if self.spec.stage == "patches":
            y = F.pad(x.view(b, rows, columns, c), (0, 0, 0, columns % 2, 0, rows % 2))
            parts = [y[:, i::2, j::2] for j in (0, 1) for i in (0, 1)]
            return self.down(self.norm(torch.cat(parts, -1).view(b, -1, 4 * c)))
        y = x.transpose(1, 2).reshape(b, c, rows, columns)
        y = F.avg_pool2d(y, 2) if self.spec.stage == "pool" else self.conv(y)
        return y.flatten(2).transpose(1, 2)
