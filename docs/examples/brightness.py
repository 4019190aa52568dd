"""Brightness of samples and of real clips, 1 is white: its mean, and how far it drifts over the frames."""

import torch

from hpdm_core import hookimpl


class Brightness:
    name, needs = "brightness", "samples"

    def protocol(self, assembly):
        counts = assembly.config.evaluation
        return {"metric": self.name, "split": "train", "samples": counts.samples, "reals": counts.reals}

    def evaluate(self, context):
        counts, rows = context.assembly.config.evaluation, []
        for level in range(context.assembly.pyramid.levels):
            made = (context.samples(level, [i]) for i in range(counts.samples))  # one by one, to save memory
            real = (context.reals("train", [i])[0][level] for i in range(counts.reals))
            for suffix, videos in ("", made), (".real", real):
                frames = torch.cat([video.double().mean(dim=(2, 3, 4)) / 255 for video in videos])  # [n, F]
                found = {"mean": frames.mean(), "drift": (frames[:, -1] - frames[:, 0]).mean()}
                named = {f"{self.name}.{what}{suffix}": float(value) for what, value in found.items()}
                rows += [{"metric": name, "level": level, "value": value} for name, value in named.items()]
        return rows


@hookimpl
def register_metrics(register):
    register("brightness", Brightness, source="an example: docs/examples.md")
