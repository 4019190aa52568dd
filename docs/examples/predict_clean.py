"""The network answers with the clean patch; its error counts 1 / sigma_eff^2, but at most ``limit``."""

from typing import Annotated

from pydantic import Field

from hpdm_core import hookimpl


class PredictClean:
    def __init__(self, *, limit: Annotated[float, Field(gt=0)] = 5.0):
        self.limit = limit

    def target(self, clean, noise, sigma, sigma_in):
        return clean

    def denoised(self, noisy, prediction, sigma, sigma_in):
        return prediction

    def weight(self, sigma, sigma_in):
        return (sigma_in * sigma).pow(-2).clamp(max=self.limit)


@hookimpl
def register_objectives(register):
    register("predict_clean", PredictClean, source="Hang et al. 2023 (2303.09556), min-SNR weighting")
