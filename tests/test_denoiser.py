import pytest
import torch

from hpdm_core.assembly.denoiser import Denoiser
from hpdm_core.config.schema import ModelConfig
from hpdm_core.model.fusion import FusionShape
from hpdm_core.model.hpdm import HPDM, Patches
from hpdm_core.model.rin import RIN
from hpdm_core.pyramid import Pyramid
from hpdm_plugins.diffusion.objectives import EffectiveV, SnapV
from hpdm_plugins.model.fusions import DeepFusion

SIGMA_IN = (4.0, 8.0)


@pytest.fixture
def model():
    pyramid = Pyramid(video=(4, 12, 20), patch=(2, 6, 10), token=(1, 3, 5), levels=2)
    config = ModelConfig(
        video=pyramid.video, patch=pyramid.patch, token=pyramid.token, levels=2, token_dim=12, blocks=2
    )
    network = HPDM(
        config,
        backbone=RIN(
            12, 2, latent_dim=6, latents=3, latent_layers=1, latent_heads=1, latent_head_dim=4, heads=2
        ),
        fusion=DeepFusion(FusionShape(12, pyramid.grid, pyramid.patch, (1, 2))),
        levels_per_block=(1, 2),
        pyramid=pyramid,
        sigma_range=(0.002, 80.0),
    )
    start = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "recall_gain" not in name:  # without biases the tokenizer's norm would hide the input scaling
                parameter += 0.3 * torch.randn(parameter.shape, generator=start)
    return network


@pytest.mark.parametrize("objective", [SnapV(), EffectiveV()])
def test_it_scales_the_input_and_decodes_the_answer(model, objective):
    denoiser = Denoiser(model, objective, SIGMA_IN)
    z0, z1 = torch.randn(2, 3, 2, 6, 10), torch.randn(2, 3, 2, 6, 10)
    sigma = torch.tensor([0.1, 2.0])
    c0 = model.pyramid.coords(0, torch.zeros(2, 3, dtype=torch.int64))
    c1 = model.pyramid.coords(1, torch.tensor([[0, 3, 5], [2, 6, 1]]))
    encoded = denoiser.encode(0, z0, sigma, c0, None, [])
    contexts = denoiser.contexts(1, c1, [encoded])
    denoised, latents = denoiser(1, z1, sigma, c1, None, contexts, None)

    def scaled(z, sigma_in):
        return z / (1 / sigma_in**2 + sigma**2).sqrt()[:, None, None, None, None]

    with torch.no_grad():
        joint = model(
            [
                Patches(0, scaled(z0, 4.0), sigma, c0),
                Patches(1, scaled(z1, 8.0), sigma, c1, sources=(0,)),
            ]
        )
    torch.testing.assert_close(
        denoised, objective.denoised(z1, joint[1][0], sigma, 8.0), atol=1e-5, rtol=1e-4
    )
    torch.testing.assert_close(latents, joint[1][1], atol=1e-5, rtol=1e-4)
    assert not denoised.requires_grad
    again, _ = denoiser(1, z1, sigma, c1, None, contexts, latents + 1)
    torch.testing.assert_close(again, denoised)  # self-conditioning starts as a no-op


def test_the_estimate_has_the_precision_of_the_state(model):
    denoiser = Denoiser(model, SnapV(), SIGMA_IN)
    coords = model.pyramid.coords(0, torch.zeros(1, 3, dtype=torch.int64))
    z = torch.randn(1, 3, 2, 6, 10, dtype=torch.float64)
    denoised, latents = denoiser(0, z, torch.tensor([1e-6]), coords, None, None, None)
    assert denoised.dtype == torch.float64
    assert latents.dtype == torch.float32
    torch.testing.assert_close(denoised, 4 * z, atol=1e-4, rtol=0)  # without noise the answer hardly counts
