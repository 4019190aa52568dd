import torch

from hpdm_core.base.randomness import generator
from hpdm_core.data.dataset import ClipDataset, ClipShape
from hpdm_plugins.data.synthetic import Synthetic

SHAPE = ClipShape(8, 24, 32)


def test_clips_have_the_range_shape_and_classes(pyav):
    dataset = Synthetic(SHAPE, pyav, classes=3)
    assert isinstance(dataset, ClipDataset)
    assert len(dataset.classes) == 3
    drawn = [dataset.draw("train", generator("test", index)) for index in range(30)]
    assert {clip.label for clip in drawn} == {0, 1, 2}
    assert {clip.video.shape for clip in drawn} == {(3, 8, 24, 32)}
    videos = torch.stack([clip.video for clip in drawn])
    assert videos.dtype == torch.float32
    assert videos.abs().max() <= 1
    assert videos.std() > 0.3


def test_a_clip_moves(pyav):
    video = Synthetic(SHAPE, pyav).draw("train", generator("test")).video
    assert (video[:, 1:] - video[:, :-1]).abs().mean() > 0.02


def test_another_size_shows_the_same_clip(pyav):
    coarse = Synthetic(ClipShape(8, 12, 16), pyav).draw("train", generator("test")).video
    fine = Synthetic(ClipShape(8, 36, 48), pyav).draw("train", generator("test")).video
    assert torch.allclose(fine[:, :, 1::3, 1::3], coarse, atol=1e-4)


def test_the_drift_is_the_whole_motion(pyav):
    """Class 0 of 4 drifts along the width: shifting the first frame by the speed gives the next."""
    dataset = Synthetic(ClipShape(64, 1, 512), pyav, classes=4)
    waves, phase, colour = dataset._waves[0], torch.rand(6), torch.rand(3, 6)
    video = dataset._video(0, phase, colour, torch.tensor(0.5))  # half a width per clip: 4 pixels per frame
    assert waves.shape == (6, 2)
    assert torch.allclose(video[:, 1, 0, 4:], video[:, 0, 0, :-4], atol=1e-3)


def test_the_seed_changes_the_textures_and_the_generator_the_clip(pyav):
    def video(seed, index):
        return Synthetic(SHAPE, pyav, classes=1, seed=seed).draw("train", generator("test", index)).video

    assert torch.equal(video(0, 0), video(0, 0))
    assert not torch.allclose(video(0, 0), video(1, 0))
    assert not torch.allclose(video(0, 0), video(0, 1))


def test_any_number_of_channels(pyav):
    shape = ClipShape(2, 4, 6, channels=1)
    assert Synthetic(shape, pyav).draw("held_out", generator("test")).video.shape == (1, 2, 4, 6)
