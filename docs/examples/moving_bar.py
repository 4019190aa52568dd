"""A bright bar that moves to the left or to the right; which of the two is the class of the clip."""

import torch

from hpdm_core import hookimpl
from hpdm_core.data.dataset import Clip


class MovingBar:
    classes = ("left", "right")

    def __init__(self, clip, reader, *, width: float = 0.25, speed: float = 0.5):
        self.clip, self.width, self.speed = clip, width, speed  # as shares of the clip's width

    def draw(self, split, generator):
        label = int(torch.randint(2, (), generator=generator))
        time = torch.arange(self.clip.frames)[:, None] / self.clip.frames  # [F, 1]
        centre = torch.rand((), generator=generator) + (2 * label - 1) * self.speed * time
        pixels = (torch.arange(self.clip.width) + 0.5) / self.clip.width  # [W]
        distance = ((pixels - centre + 0.5) % 1 - 0.5).abs()  # [F, W]; the bar comes back at the other side
        bar = ((self.width / 2 - distance) * self.clip.width + 0.5).clamp(0, 1)  # with soft edges
        return Clip((2 * bar - 1)[None, :, None].repeat(self.clip.channels, 1, self.clip.height, 1), label)

    def distinct(self, split):
        return None  # no two clips are alike

    def describe(self):
        return {"name": "moving_bar", "width": self.width, "speed": self.speed}


@hookimpl
def register_datasets(register):
    register("moving_bar", MovingBar, source="an example: docs/examples.md")
