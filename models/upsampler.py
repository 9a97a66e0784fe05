"""Upsamplers: an unconditional U-Net that sees the low resolution beside the noise (Ramesh et
al. 2022, section 2.1)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import keyed_random
from models.configs import UpsamplerConfig
from models.decoder import ImageSampling
from models.degrade import gaussian_blur
from models.losses import draw_timesteps, timestep_weight
from models.samplers import clipped
from models.schedule import NoiseSchedule
from models.unet import UNet


class Upsampler(nn.Module):
    """Raises images by an integer `factor`; trained on crops, run fully convolutionally."""

    def __init__(self, config: UpsamplerConfig, *, factor: int, crop_size: int) -> None:
        super().__init__()
        if config.unet.attn_resolutions:
            raise ValueError(
                f"attn_resolutions: found {config.unet.attn_resolutions}, upsamplers take none"
            )
        self.config = config
        self.factor = factor
        self.schedule = NoiseSchedule.build(config.schedule, config.num_timesteps)
        self.unet = UNet(config.unet, image_size=crop_size, in_channels=6, out_channels=3)

    def forward(self, x_t: Tensor, t: Tensor, low_res: Tensor) -> Tensor:
        """Predict for x_t [B, 3, fH, fW] given low_res [B, 3, H, W], both in [-1, 1]."""
        raised = F.interpolate(
            low_res, scale_factor=self.factor, mode="bilinear", align_corners=False
        )
        return self.unet(torch.cat([x_t, raised], dim=1), t)

    def losses(self, keys: Tensor, image: Tensor) -> dict[str, Tensor]:
        """Return {"loss": [B]} for high-resolution crops [B, 3, H, W] in [-1, 1]."""
        config = self.config
        low_res = gaussian_blur(F.avg_pool2d(image, self.factor))
        level = (
            config.low_res_noise * keyed_random.uniform(keys, "low_res_level")[:, None, None, None]
        )
        low_res = low_res + level * keyed_random.normal(keys, "low_res_noise", low_res.shape[1:])
        t = draw_timesteps(self.schedule, keys, config.noise_bias)
        eps = keyed_random.normal(keys, "eps", image.shape[1:])
        output = self(self.schedule.q_sample(image, t, eps), t, low_res)
        error = (
            (output - self.schedule.target(config.prediction, image, t, eps))
            .square()
            .mean((1, 2, 3))
        )
        return {
            "loss": timestep_weight(self.schedule, config.weighting, config.prediction, t) * error
        }

    @torch.no_grad()
    def sample(self, keys: Tensor, low_res: Tensor, options: ImageSampling) -> Tensor:
        """Raise low_res [B, 3, H, W] to [B, 3, fH, fW] in [-1, 1]; `cfg_scale` does not apply."""
        shape = (3, *(self.factor * side for side in low_res.shape[2:]))

        def denoise(x: Tensor, t: Tensor) -> Tensor:
            return self.schedule.to_x0(self.config.prediction, self(x, t, low_res), x, t)

        x = keyed_random.normal(keys, f"upsampler_{shape[1]}", shape)
        noise = lambda step: keyed_random.normal(keys, f"upsampler_{shape[1]}_{step}", shape)  # noqa: E731
        return options.sampler(
            clipped(denoise, 1.0), x, self.schedule, options.sample_steps, noise
        ).clamp(-1, 1)
