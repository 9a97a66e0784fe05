"""Upsamplers: an unconditional U-Net that sees the low resolution beside the noise (Ramesh et
al. 2022, section 2.1)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.configs import UpsamplerConfig
from models.decoder import ImageSampling
from models.degradation import bsr, gaussian_blur, shrink
from models.diffusion import keyed_random
from models.diffusion.losses import draw_timesteps, timestep_weight
from models.diffusion.samplers import clipped
from models.diffusion.schedule import NoiseSchedule
from models.networks.autocast import without_autocast
from models.networks.transformer import TimestepMLP
from models.networks.unet import UNet

NOISE_LEVELS = 1000  # as which the network is told a standard deviation in [0, 1]


class Upsampler(nn.Module):
    """Raises images by an integer `factor`; trained on crops, run fully convolutionally."""

    def __init__(self, config: UpsamplerConfig, *, factor: int, crop_size: int) -> None:
        super().__init__()
        if config.unet.attn_resolutions:
            raise ValueError(
                f"attn_resolutions: found {config.unet.attn_resolutions}, upsamplers take none"
            )
        self.config = config
        self.factor, self.crop_size = factor, crop_size
        if config.tell_noise and not config.low_res_noise:
            raise ValueError("tell_noise: found true with low_res_noise 0, expected some noise")
        self.schedule = NoiseSchedule.build(
            config.schedule,
            config.num_timesteps,
            zero_terminal=config.zero_terminal,
            prediction=config.prediction,
        )
        self.unet = UNet(config.unet, image_size=crop_size, in_channels=6, out_channels=3)
        width = config.unet.channels
        self.noise_in = TimestepMLP(width, self.unet.cond_width) if config.tell_noise else None

    def forward(
        self, x_t: Tensor, t: Tensor, low_res: Tensor, noise_level: Tensor | None = None
    ) -> Tensor:
        """Predict for x_t [B, 3, fH, fW] given low_res [B, 3, H, W], both in [-1, 1].

        noise_level: [B], the standard deviation of noise in `low_res`; None for none.
        """
        return self._predict(x_t, t, self._raised(low_res), noise_level)

    def _raised(self, low_res: Tensor) -> Tensor:
        """Return low_res [B, 3, H, W] at the size of the result."""
        return F.interpolate(
            low_res, scale_factor=self.factor, mode=self.config.interpolation, align_corners=False,
            antialias=self.config.interpolation == "bicubic",
        )  # fmt: skip

    def _predict(
        self, x_t: Tensor, t: Tensor, raised: Tensor, noise_level: Tensor | None = None
    ) -> Tensor:
        cond = None
        if self.noise_in is not None:
            level = torch.zeros(len(t), device=t.device) if noise_level is None else noise_level
            cond = self.noise_in(level * NOISE_LEVELS)
        return self.unet(torch.cat([x_t, raised], dim=1), t, cond=cond)

    def _predict_in_parts(self, x: Tensor, t: Tensor, raised: Tensor, tile: int) -> Tensor:
        """Predict for the whole of x, or part by part where it is larger than `tile`.

        Parts overlap by a quarter, and are faded into each other; activations then take the memory
        of a part. Only borders, and GroupNorm, which sees a part at a time, tell them from the
        whole.
        """
        if not tile or max(x.shape[2:]) <= tile:
            return self._predict(x, t, raised)
        total, weight = torch.zeros_like(x), torch.zeros_like(x[:1, :1])
        rise = torch.arange(1, tile + 1, device=x.device, dtype=x.dtype)
        fade = torch.minimum(rise, rise.flip(0)).clamp(max=max(1, tile // 4))
        for rows in _parts(x.shape[2], tile, self.factor):
            for columns in _parts(x.shape[3], tile, self.factor):
                part = x[:, :, rows, columns]
                window = fade[: part.shape[2], None] * fade[: part.shape[3]]
                found = self._predict(part, t, raised[:, :, rows, columns])
                total[:, :, rows, columns] += window * found
                weight[:, :, rows, columns] += window
        return total / weight

    def _require_tiles(self, tile: int) -> None:
        unet = self.config.unet
        step = math.lcm(self.factor, unet.patch_size * 2 ** (len(unet.channel_mult) - 1))
        if tile < 0 or tile % step:
            raise ValueError(f"tile: found {tile}, expected a multiple of {step} px, or 0 for none")

    def corrupted(self, image: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Return the low resolution that training sees of crops [B, 3, H, W], and the standard
        deviation [B] of the noise in it."""
        config = self.config
        with without_autocast(image):  # levels of 255 have no room in bf16
            if config.degradation == "bsr":
                low_res = bsr(image, keys, self.factor)
            else:
                low_res = gaussian_blur(shrink(image, self.factor))
        level = config.low_res_noise * keyed_random.uniform(keys, "low_res_level")
        noise = keyed_random.normal(keys, "low_res_noise", low_res.shape[1:])
        return low_res + level[:, None, None, None] * noise, level

    def losses(self, keys: Tensor, image: Tensor) -> dict[str, Tensor]:
        """Return {"loss": [B]} for high-resolution crops [B, 3, H, W] in [-1, 1]."""
        config = self.config
        low_res, level = self.corrupted(image, keys)
        t = draw_timesteps(self.schedule, keys, config.noise_bias)
        eps = keyed_random.normal(keys, "eps", image.shape[1:])
        output = self(self.schedule.q_sample(image, t, eps), t, low_res, level)
        target = self.schedule.target(config.prediction, image, t, eps)
        error = (output - target).square().mean((1, 2, 3))
        weight = timestep_weight(self.schedule, config.weighting, config.prediction, t)
        return {"loss": weight * error}

    @torch.no_grad()
    def sample(
        self,
        keys: Tensor,
        low_res: Tensor,
        options: ImageSampling,
        *,
        final: "Upsampler | None" = None,
    ) -> Tensor:
        """Raise low_res [B, 3, H, W] to [B, 3, fH, fW] in [-1, 1]; guidance does not apply.

        final: another network for the last step, as Karlo's has one; None for this one.
        Raises ValueError for the sampler learned_ddpm: upsamplers learn no variance.
        """
        if options.sampler == "learned_ddpm":
            raise ValueError("sampler: found learned_ddpm for an upsampler, expected another")
        if options.tile:
            self._require_tiles(options.tile)
        schedule = self.schedule.spaced(options.spacing)
        last = schedule.timesteps(options.sample_steps)[-1]
        raised = self._raised(low_res)
        shape = tuple(raised.shape[1:])

        def denoise(x: Tensor, t: Tensor) -> Tensor:
            network = final if final is not None and int(t[0]) == last else self
            found = network._predict_in_parts(x, t, raised, options.tile)
            return self.schedule.to_x0(self.config.prediction, found, x, t)

        x = keyed_random.normal(keys, f"upsampler_{shape[1]}", shape)
        noise = lambda step: keyed_random.normal(keys, f"upsampler_{shape[1]}_{step}", shape)  # noqa: E731
        return options.sampler(
            clipped(denoise, 1.0), x, schedule, options.sample_steps, noise
        ).clamp(-1, 1)


def _parts(length: int, tile: int, step: int) -> list[slice]:
    """Return parts of `tile`, a quarter or more of which their neighbours share, that cover
    [0, length); they begin at multiples of `step`."""
    if length <= tile:
        return [slice(0, length)]
    count = math.ceil((length - tile) / (0.75 * tile)) + 1
    starts = [round(i * (length - tile) / (count - 1) / step) * step for i in range(count)]
    return [slice(start, start + tile) for start in starts]
