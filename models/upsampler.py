"""Upsamplers: an unconditional U-Net over the low resolution beside the noise (Ramesh et al. 2022,
section 2.1)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.configs import UpsamplerConfig
from models.decoder import ImageSampling
from models.degradation import bsr, gaussian_blur, shrink
from models.diffusion import keyed_random
from models.diffusion.losses import draw_timesteps, timestep_weight
from models.diffusion.samplers import Denoised, clipped
from models.diffusion.schedule import NoiseSchedule
from models.networks.compiling import compiled
from models.networks.transformer import TimestepMLP, without_autocast
from models.networks.unet import UNet

NOISE_LEVELS = 1000  # a standard deviation in [0, 1] enters the network as a number up to this


class Upsampler(nn.Module):
    """Raises images by an integer `factor`; trained on crops of `crop_size` px, run fully
    convolutionally. Raises ValueError for a network with attention, and for `tell_noise` without
    noise."""

    outer_layers = ("noise_in",)

    def __init__(self, config: UpsamplerConfig, *, factor: int, crop_size: int) -> None:
        super().__init__()
        if config.unet.attn_resolutions:
            raise ValueError(
                f"attn_resolutions: found {config.unet.attn_resolutions}, upsamplers take none"
            )
        if config.tell_noise and not config.low_res_noise:
            raise ValueError("tell_noise: found true with low_res_noise 0, expected some noise")
        if config.residual and config.prediction != "x0":
            raise ValueError(
                f"residual: found true with prediction {config.prediction}, expected x0"
            )
        self.config = config
        self.factor, self.crop_size = factor, crop_size
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
        """Predict `config.prediction`, float32 [B, 3, fH, fW], for x_t [B, 3, fH, fW] at t int64
        [B].

        low_res: [B, 3, H, W] in [-1, 1]; noise_level: [B], the standard deviation of noise in it,
        None for none.
        """
        return self._predict(x_t, t, self._interpolated(low_res), noise_level)

    def _interpolated(self, low_res: Tensor) -> Tensor:
        """Return low_res [B, 3, H, W] as [B, 3, fH, fW]."""
        return F.interpolate(
            low_res, scale_factor=self.factor, mode=self.config.interpolation, align_corners=False,
            antialias=self.config.interpolation == "bicubic",
        )  # fmt: skip

    def _predict(
        self, x_t: Tensor, t: Tensor, interpolated: Tensor, noise_level: Tensor | None = None
    ) -> Tensor:
        cond = None
        if self.noise_in is not None:
            level = torch.zeros(len(t), device=t.device) if noise_level is None else noise_level
            cond = self.noise_in(level * NOISE_LEVELS)  # [B, cond]
        x = torch.cat([x_t, interpolated], dim=1)  # [B, 6, fH, fW]
        output = self.unet(x, t, cond=cond)  # [B, 3, fH, fW]
        return output + interpolated if self.config.residual else output

    def _predict_tiled(self, x: Tensor, t: Tensor, interpolated: Tensor, tile: int) -> Tensor:
        """Predict for x [B, 3, fH, fW], tile by tile where it is larger than `tile` px.

        Tiles overlap by a quarter and are blended; activations then take the memory of a tile. The
        result differs from an untiled one at the borders, and by GroupNorm's statistics.
        """
        if not tile or max(x.shape[2:]) <= tile:
            return self._predict(x, t, interpolated)
        total, weight = torch.zeros_like(x), torch.zeros_like(x[:1, :1])
        ramp = torch.arange(1, tile + 1, device=x.device, dtype=x.dtype)
        fade = torch.minimum(ramp, ramp.flip(0)).clamp(max=max(1, tile // 4))
        for rows in _tiles(x.shape[2], tile, self.factor):
            for columns in _tiles(x.shape[3], tile, self.factor):
                x_tile = x[:, :, rows, columns]  # [B, 3, tile, tile]
                window = fade[: x_tile.shape[2], None] * fade[: x_tile.shape[3]]  # [tile, tile]
                output = self._predict(x_tile, t, interpolated[:, :, rows, columns])
                total[:, :, rows, columns] += window * output
                weight[:, :, rows, columns] += window
        return total / weight

    def degrade(self, image: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Return the low resolution [B, 3, H, W] that training reads for crops image
        [B, 3, fH, fW], and the standard deviation [B] of the noise in it; keys: int64 [B]."""
        config = self.config
        with without_autocast(image):  # bf16 cannot represent 255 levels
            if config.degradation == "bsr":
                low_res = bsr(image, keys, self.factor)
            else:
                low_res = shrink(image, self.factor)
                low_res = gaussian_blur(low_res) if config.degradation == "blur" else low_res
        level = config.low_res_noise * keyed_random.uniform(keys, "low_res_level")  # [B]
        noise = keyed_random.normal(keys, "low_res_noise", low_res.shape[1:])
        return low_res + level[:, None, None, None] * noise, level

    def losses(self, keys: Tensor, image: Tensor) -> dict[str, Tensor]:
        """Return {"loss": [B]} for high-resolution crops image [B, 3, fH, fW] in [-1, 1].

        Degradation, timesteps and noise come from the sample `keys` int64 [B].
        """
        x_t, t, eps, low_res, level = self._noise(keys, image)
        output = self(x_t, t, low_res, level)  # [B, 3, fH, fW]
        return self._score(output, image, t, eps)

    @compiled(dynamic=None)
    def _noise(self, keys: Tensor, image: Tensor) -> tuple[Tensor, ...]:
        """Return what training draws: x_t, t and eps, the low resolution [B, 3, H, W], and the
        standard deviation [B] of the noise in it."""
        low_res, level = self.degrade(image, keys)  # [B, 3, H, W], [B]
        t = draw_timesteps(self.schedule, keys, self.config.noise_bias)  # [B]
        eps = keyed_random.normal(keys, "eps", image.shape[1:])  # [B, 3, fH, fW]
        x_t = self.schedule.q_sample(image, t, eps)  # [B, 3, fH, fW]
        return x_t, t, eps, low_res, level

    @compiled(dynamic=None)
    def _score(self, output: Tensor, image: Tensor, t: Tensor, eps: Tensor) -> dict[str, Tensor]:
        """Return `losses` of the network's output [B, 3, fH, fW]."""
        config = self.config
        target = self.schedule.target(config.prediction, image, t, eps)
        error = (output - target).square().mean((1, 2, 3))  # [B]
        weight = timestep_weight(self.schedule, config.weighting, config.prediction, t)  # [B]
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
        """Raise low_res [B, 3, H, W] to [B, 3, fH, fW] in [-1, 1], without guidance.

        keys: int64 [B]; final: another network for the last step, as Karlo has one; None for this
        one. Raises ValueError for a sampler that needs a learned variance, and for a tile that the
        network cannot halve.
        """
        unet, tile = self.config.unet, options.tile
        step = math.lcm(self.factor, unet.patch_size * 2 ** (len(unet.channel_mult) - 1))
        if tile < 0 or tile % step:
            raise ValueError(f"tile: found {tile}, expected a multiple of {step} px, or 0 for none")

        schedule = self.schedule.spaced(options.spacing)
        last = schedule.timesteps(options.sample_steps)[-1]
        interpolated = self._interpolated(low_res)  # [B, 3, fH, fW]
        shape = tuple(interpolated.shape[1:])

        def denoise(x: Tensor, t: Tensor) -> Denoised:
            network = final if final is not None and int(t[0]) == last else self
            output = network._predict_tiled(x, t, interpolated, tile)
            return Denoised(self.schedule.to_x0(self.config.prediction, output, x, t))

        purpose = f"upsampler_{shape[1]}"
        x = keyed_random.normal(keys, purpose, shape)  # [B, 3, fH, fW]
        noise = keyed_random.step_noise(keys, purpose, shape)
        x0 = options.sampler(clipped(denoise, 1.0), x, schedule, options.sample_steps, noise)
        return x0.clamp(-1, 1)


def _tiles(length: int, tile: int, step: int) -> list[slice]:
    """Return tiles that cover [0, length), begin at multiples of `step`, and share at least a
    quarter with their neighbours."""
    if length <= tile:
        return [slice(0, length)]
    count = math.ceil((length - tile) / (0.75 * tile)) + 1
    starts = [round(i * (length - tile) / (count - 1) / step) * step for i in range(count)]
    return [slice(start, start + tile) for start in starts]
