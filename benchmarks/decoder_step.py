"""Training samples/s and memory of the base decoder, beside dalle2-pytorch's Unet and diffusers'.

    python benchmarks/decoder_step.py        # some ten minutes on two cores

Each reads images of 32 px, an embedding of 512 and 20 token states, has as many parameters as ours
within 5 %, and takes whole training steps: noise, conditioning drops, forward, the loss on eps,
backward, AdamW (torch's fused one), on the same number of threads. Ours folds 2 x 2 px into a cell
first, which `benchmarks/patching.py` weighs; "ours, unfolded" is diffusers' shape, Karlo's, whose
weights it could load. Each measurement is a process of its own, in turn; `memory_ratio` is ours
over the least of the peers', of what a process took beyond its imports.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

from _common import run_benchmark
from _steps import DALLE2, OURS, StepsConfig, run

SIZE, EMBED, WORDS, CONTEXT = 32, 512, 20, 256
CHANNELS, MULT, BLOCKS, HEAD = 64, (1, 2, 3), 1, 32


@dataclass(frozen=True, kw_only=True)
class Config(StepsConfig):
    """Sizes of the comparison."""

    batch_size: int = 16
    """samples a step"""


def main(config: Config) -> int:
    """Print a table, and one JSON object as the last line."""
    unfolded = partial(_ours, patch_size=1, attending=(16, 8))
    builds = {OURS: _ours, f"{OURS}, unfolded": unfolded, "diffusers": _diffusers, DALLE2: _dalle2}
    return run(__file__, config, builds, lambda: _batch(config))


def _batch(config: Config) -> dict[str, Any]:
    """Return images in [-1, 1], embeddings, states and masks of captions of 4 to 20 tokens."""
    import torch
    import torch.nn.functional as F

    count = config.batch_size
    lengths = torch.linspace(4, WORDS, count).long()
    mask = torch.arange(WORDS) < lengths[:, None]
    return {
        "image": torch.rand(count, 3, SIZE, SIZE) * 2 - 1,
        "image_embed": F.normalize(torch.randn(count, EMBED), dim=1),
        "states": torch.randn(count, WORDS, EMBED) * mask[..., None],
        "mask": mask,
    }


def _ours(
    compiled: bool, patch_size: int = 2, attending: tuple[int, ...] = (8, 4)
) -> tuple[Any, Callable]:
    import torch

    from models.configs import DecoderConfig, UNetConfig
    from models.decoder import Condition, Decoder

    unet = UNetConfig(
        channels=CHANNELS, channel_mult=MULT, num_res_blocks=BLOCKS, head_channels=HEAD,
        patch_size=patch_size, attn_resolutions=attending,
    )  # fmt: skip
    config = DecoderConfig(unet=unet, context_width=CONTEXT, prediction="eps", weighting="simple")
    decoder = Decoder(config, image_size=SIZE, embed_dim=EMBED, text_width=EMBED)
    if compiled:
        decoder.compile()

    def loss_of(image: Any, image_embed: Any, states: Any, mask: Any) -> Any:
        keys = torch.arange(len(image), device=image.device)
        condition = Condition(image_embed=image_embed, text_states=states, token_mask=mask)
        return decoder.losses(keys, image, condition)["loss"].mean()

    return decoder, loss_of


def _diffusers(compiled: bool) -> tuple[Any, Callable]:
    import torch
    import torch.nn.functional as F
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
    from torch import nn

    attending = ("SimpleCrossAttnDownBlock2D",) * 2, ("SimpleCrossAttnUpBlock2D",) * 2
    unet = UNet2DConditionModel(
        sample_size=SIZE, in_channels=3, out_channels=3,
        down_block_types=("ResnetDownsampleBlock2D", *attending[0]),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=(*attending[1], "ResnetUpsampleBlock2D"),
        block_out_channels=tuple(CHANNELS * mult for mult in MULT), layers_per_block=BLOCKS,
        cross_attention_dim=CONTEXT, attention_head_dim=HEAD, norm_num_groups=16,
        resnet_time_scale_shift="scale_shift", class_embed_type="identity",
    )  # fmt: skip
    project = UnCLIPTextProjModel(
        clip_extra_context_tokens=4, clip_embeddings_dim=EMBED, time_embed_dim=4 * CHANNELS,
        cross_attention_dim=CONTEXT,
    )  # fmt: skip
    schedule = DDPMScheduler(num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2")
    network: Any = torch.compile(unet) if compiled else unet
    null = project.learned_classifier_free_guidance_embeddings

    def loss_of(image: Any, image_embed: Any, states: Any, mask: Any) -> Any:
        count = len(image)
        t = torch.randint(0, 1000, (count,), device=image.device)
        noise: Any = torch.randn_like(image)
        noised = schedule.add_noise(image, noise, cast(Any, t))
        gone = torch.rand(count, 1, device=image.device) < 0.1
        hidden = torch.rand(count, 1, device=image.device) < 0.5
        context, cond = project(
            image_embeddings=torch.where(gone, null, image_embed), prompt_embeds=image_embed,
            text_encoder_hidden_states=states, do_classifier_free_guidance=False,
        )  # fmt: skip
        keep = F.pad(mask & ~hidden, (4, 0), value=True)
        arguments = {"encoder_hidden_states": context, "class_labels": cond, "attention_mask": keep}
        return F.mse_loss(network(noised, t, **arguments).sample.float(), noise)

    return nn.ModuleList([unet, project]), loss_of


def _dalle2(compiled: bool) -> tuple[Any, Callable]:
    import torch
    from dalle2_pytorch.dalle2_pytorch import (  # pyright: ignore[reportMissingImports]
        Decoder,
        Unet,
    )

    unet = Unet(
        dim=60, resnet_groups=4, image_embed_dim=EMBED, text_embed_dim=EMBED, cond_dim=CONTEXT,
        channels=3, dim_mults=MULT, self_attn=(False, True, True), attn_dim_head=HEAD, attn_heads=4,
        num_resnet_blocks=1, cond_on_text_encodings=True, cond_on_image_embeds=True,
        max_text_len=WORDS,
    )  # fmt: skip
    decoder = Decoder(
        unet=(unet,), image_sizes=(SIZE,), timesteps=1000, image_cond_drop_prob=0.1,
        text_cond_drop_prob=0.5, learned_variance=False, auto_normalize_img=False,
    )  # fmt: skip
    if compiled:
        decoder.unets[0] = torch.compile(unet)

    def loss_of(image: Any, image_embed: Any, states: Any, mask: Any) -> Any:
        return decoder(image=image, image_embed=image_embed, text_encodings=states, unet_number=1)

    return decoder, loss_of


if __name__ == "__main__":
    run_benchmark(Config, main, num_steps=1, repeats=1, batch_size=2)
