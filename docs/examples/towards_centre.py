"""Training patches more often from the centre of the video, each with the parents that sampling gives it."""

from typing import Annotated

import torch
from pydantic import Field

from hpdm_core import hookimpl


class TowardsCentre:
    def __init__(self, pyramid, *, draws: Annotated[int, Field(gt=0)] = 2):
        self.pyramid, self.draws = pyramid, draws

    def sample(self, generator):
        finest = self.pyramid.levels - 1
        size, patch = torch.tensor(self.pyramid.size(finest)), torch.tensor(self.pyramid.patch)
        places = torch.rand(self.draws, 3, generator=generator, dtype=torch.float64).mean(dim=0)
        offset = (places * (size - patch + 1)).long().tolist()
        return torch.tensor([*self.pyramid.chain(finest, offset), offset])


@hookimpl
def register_coordinate_samplers(register):
    register("towards_centre", TowardsCentre, source="an example: docs/examples.md")
