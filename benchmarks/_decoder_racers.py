"""Decoders that race in quality_an_hour.py: ours, diffusers' unCLIP U-Net, dalle2-pytorch's."""

import copy
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from _racers import (
    DALLE2,
    DIFFUSERS,
    OURS,
    RATES,
    SIZE,
    Arrays,
    Heat,
    Trained,
    accelerated,
    laps_of,
    plain_loop,
    rate_at,
    train_ours,
    unit_rms,
)

GUIDANCE = 1.5
IMAGE_DROP, TEXT_DROP = 0.1, 0.3  # probabilities, of every racer
CONTEXT, NUM_TOKENS = 128, 4  # width of the condition's tokens, and z_i's among them

# Channels of the first layers of our U-Net and of the peers', and width of our transformer, by
# which all are of near-equal size: 5 to 6 million parameters, or 3 to 4
SIZES = {"demo": (64, 48, 192), "small": (32, 36, 144)}

_OURS = (
    "--preset", "demo_pictures",
    "--base.image-embed-drop", str(IMAGE_DROP), "--base.text-drop", str(TEXT_DROP),
)  # fmt: skip
# By racer, the settings of which the best in a heat of a quarter of the time runs the race
DECODER_SETTINGS: dict[str, dict[str, Any]] = {
    OURS: {
        "U-Net": ("--base.network", "unet"),
        "transformer": (
            "--base.network", "dit", "--base.dit.depth", "6", "--base.dit.num-heads", "4",
            "--base.dit.patch-size", "4", "--base.dit.refine-channels", "16",
        ),
    },
    DIFFUSERS: {f"{kind}, lr {rate}": (kind, rate) for kind in ("v", "eps") for rate in RATES},
    DALLE2: {f"{kind}, lr {rate}": (kind, rate) for kind in ("v", "eps") for rate in RATES},
}  # fmt: skip


# -- ours ------------------------------------------------------------------------------------------


def _ours(heat: Heat, device: Any) -> Iterator[Trained]:
    channels, _, width = SIZES[heat.size]
    flags = [
        *_OURS, *DECODER_SETTINGS[OURS][heat.setting], "--base.unet.channels", str(channels),
        "--base.dit.width", str(width), "--images", f"{heat.data}/train",
        "--clip", f"{heat.data}/clip", "--image-size", str(SIZE),
    ]  # fmt: skip
    return train_ours(heat, device, "decoder.py", flags, _draw_ours)


def _draw_ours(decoder: Any, rows: Arrays, steps: int) -> Any:
    from models.decoder import Condition, ImageSampling
    from models.diffusion.samplers import dpmpp_2m

    condition = Condition(
        image_embed=rows.image_embed, text_embed=rows.text_embed, text_states=rows.states,
        token_mask=rows.mask,
    )  # fmt: skip
    options = ImageSampling(sampler=dpmpp_2m, sample_steps=steps, cfg_scale=GUIDANCE)
    return decoder.sample(rows.key, condition, options)


# -- diffusers -------------------------------------------------------------------------------------


def _diffusers(heat: Heat, device: Any) -> Iterator[Trained]:
    """Train diffusers' unCLIP U-Net with its projections."""
    import torch
    import torch.nn.functional as F
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
    from torch import nn

    train = Arrays.read(Path(heat.data), "train", device)
    embed, channels = train.image_embed.shape[1], SIZES[heat.size][1]
    unet = UNet2DConditionModel(
        sample_size=SIZE, in_channels=3, out_channels=3,
        down_block_types=("ResnetDownsampleBlock2D", *("SimpleCrossAttnDownBlock2D",) * 2),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=(*("SimpleCrossAttnUpBlock2D",) * 2, "ResnetUpsampleBlock2D"),
        block_out_channels=(channels, 2 * channels, 3 * channels), layers_per_block=1,
        cross_attention_dim=CONTEXT, attention_head_dim=channels // 2,
        norm_num_groups=channels // 3, resnet_time_scale_shift="scale_shift",
        class_embed_type="identity",
    )  # fmt: skip
    project = UnCLIPTextProjModel(
        clip_extra_context_tokens=NUM_TOKENS, clip_embeddings_dim=embed,
        time_embed_dim=4 * channels, cross_attention_dim=CONTEXT,
    )  # fmt: skip
    # its projection reads states of the embedding's width
    width = train.states.shape[-1]
    if width != embed:
        project.encoder_hidden_states_proj = nn.Linear(width, CONTEXT)
    model = nn.ModuleDict({"unet": unet, "project": project}).to(device)

    schedule = DDPMScheduler(num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2")
    kind, rate = DECODER_SETTINGS[DIFFUSERS][heat.setting]

    def loss_of(rows: Arrays) -> Any:
        x0, count = rows.image.float() / 127.5 - 1, len(rows)
        t: Any = torch.randint(0, 1000, (count,), device=device)
        noise: Any = torch.randn_like(x0)
        drops = torch.tensor([[IMAGE_DROP], [TEXT_DROP]], device=device)
        hidden = torch.rand(2, count, device=device) < drops
        x_t = schedule.add_noise(x0, noise, t)
        predicted = _predict_diffusers(model, x_t, t, rows, hidden[0], hidden[1])
        target = noise if kind == "eps" else schedule.get_velocity(x0, noise, t)
        return F.mse_loss(predicted.float(), target)

    return plain_loop(heat, model, rate, loss_of, partial(_draw_diffusers, kind=kind))


def _predict_diffusers(
    model: Any, x_t: Any, t: Any, rows: Arrays, no_image: Any, no_text: Any
) -> Any:
    import torch
    import torch.nn.functional as F

    project = model["project"]
    null = project.learned_classifier_free_guidance_embeddings
    context, cond = project(
        image_embeddings=torch.where(no_image[:, None], null, unit_rms(rows.image_embed)),
        prompt_embeds=unit_rms(rows.text_embed) * ~no_text[:, None],
        text_encoder_hidden_states=rows.states, do_classifier_free_guidance=False,
    )  # fmt: skip
    keep = F.pad(rows.mask & ~no_text[:, None], (NUM_TOKENS, 0), value=True)
    arguments = {"encoder_hidden_states": context, "class_labels": cond, "attention_mask": keep}
    return model["unet"](x_t, t, **arguments).sample


def _draw_diffusers(model: Any, rows: Arrays, steps: int, kind: str) -> Any:
    """Draw by its DPM-Solver++, guided as its pipelines do, with x0 clamped to [-1, 1]."""
    import torch
    from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler

    solver = DPMSolverMultistepScheduler(
        num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2", timestep_spacing="trailing",
        prediction_type="epsilon" if kind == "eps" else "v_prediction", thresholding=True,
        dynamic_thresholding_ratio=1.0, sample_max_value=1.0,
    )  # fmt: skip
    device, count = rows.image.device, len(rows)
    solver.set_timesteps(steps, device=device)
    x = torch.randn(count, 3, SIZE, SIZE, device=device)
    shown = torch.zeros(count, dtype=torch.bool, device=device)
    for t in solver.timesteps:
        times = t.expand(count)
        cond = _predict_diffusers(model, x, times, rows, shown, shown).float()
        uncond = _predict_diffusers(model, x, times, rows, ~shown, ~shown).float()
        output = uncond + GUIDANCE * (cond - uncond)
        x = solver.step(output, t, x).prev_sample  # pyright: ignore
    return x


# -- dalle2-pytorch --------------------------------------------------------------------------------


def _dalle2(heat: Heat, device: Any) -> Iterator[Trained]:
    """Train dalle2-pytorch's Decoder by its own trainer."""
    from dalle2_pytorch import Decoder, DecoderTrainer, Unet  # pyright: ignore

    train = Arrays.read(Path(heat.data), "train", device)
    embed = train.image_embed.shape[1]
    # where both widths are equal, its Unet skips the projection that makes z_i's tokens, and fails
    width = CONTEXT + 8 * (embed == CONTEXT)
    unet = Unet(
        dim=SIZES[heat.size][1], resnet_groups=4, image_embed_dim=embed,
        text_embed_dim=train.states.shape[-1], cond_dim=width, channels=3,
        dim_mults=(1, 2, 3), self_attn=(False, True, True),
        attn_dim_head=32, attn_heads=4, num_resnet_blocks=1, cond_on_text_encodings=True,
        cond_on_image_embeds=True, max_text_len=train.states.shape[1],
    )  # fmt: skip

    kind, rate = DECODER_SETTINGS[DALLE2][heat.setting]

    def decoder_of(unet: Any, steps: int | None = None) -> Any:
        return Decoder(
            unet=(unet,), image_sizes=(SIZE,), timesteps=1000, sample_timesteps=steps,
            image_cond_drop_prob=IMAGE_DROP, text_cond_drop_prob=TEXT_DROP, learned_variance=False,
            predict_v=kind == "v",
        ).to(device)  # fmt: skip

    trainer = DecoderTrainer(decoder_of(unet), lr=rate, **accelerated(device))
    batches = train.batches(heat.batch_size)

    def step(share: float) -> None:
        for group in trainer.optim0.param_groups:
            group["lr"] = rate_at(rate, share)
        rows = next(batches)
        trainer(
            rows.image.float() / 255, image_embed=unit_rms(rows.image_embed),
            text_encodings=rows.states, unet_number=1,
        )  # fmt: skip
        trainer.update(1)

    def draw(unet: Any, rows: Arrays, steps: int) -> Any:
        decoder = decoder_of(unet, steps).eval()
        drawn = decoder.sample(
            image_embed=unit_rms(rows.image_embed), text_encodings=rows.states,
            cond_scale=GUIDANCE,
        )  # fmt: skip
        return 2 * drawn - 1

    trainer.train()
    parameters = sum(p.numel() for p in unet.parameters())
    for seconds, steps in laps_of(heat, step):
        averaged = copy.deepcopy(trainer.ema_unets[0].ema_model)
        yield Trained(
            seconds=seconds, steps=steps, parameters=parameters, draw=partial(draw, averaged)
        )


DECODERS = {OURS: _ours, DIFFUSERS: _diffusers, DALLE2: _dalle2}
