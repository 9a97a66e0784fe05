"""Who races in quality_an_hour.py: decoders that train for given seconds, and then draw.

Each is a process of its own, which reads arrays and writes what it drew after each lap.
"""

import copy
import dataclasses
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from cluster.base.files import Json

ROOT = Path(__file__).resolve().parent.parent
SIZE = 32  # px
TRIAL = 30  # steps of ours, to learn how many fit into the time
AVERAGE = 0.99  # EMA of every racer
GUIDANCE = 1.5
IMAGE_DROP, TEXT_DROP = 0.1, 0.3  # probabilities, of every racer
MIN_STEPS, MAX_STEPS = 4, 50  # of sampling
WARM_UP = 0.05  # of the time
AT_ONCE = 50  # pictures
CONTEXT, NUM_TOKENS = 128, 4  # width of the condition's tokens, and z_i's among them
OURS, DIFFUSERS, DALLE2 = "ours", "diffusers", "dalle2-pytorch"

RATES = (1e-3, 3e-4)  # of learning, of the peers

_OURS = (
    "--preset", "demo_pictures", "--train.ema-decay", str(AVERAGE), "--train.num-workers", "0",
    "--train.report-every", "5", "--train.keep-checkpoints", "100",
    "--base.image-embed-drop", str(IMAGE_DROP), "--base.text-drop", str(TEXT_DROP),
)  # fmt: skip
# By racer, the settings of which the best in a heat of a quarter of the time runs the race
SETTINGS: dict[str, dict[str, Any]] = {
    OURS: {
        "U-Net": ("--base.network", "unet"),
        "transformer": (
            "--base.network", "dit", "--base.dit.width", "192", "--base.dit.depth", "6",
            "--base.dit.num-heads", "4", "--base.dit.patch-size", "4",
            "--base.dit.refine-channels", "16",
        ),
    },
    DIFFUSERS: {f"{kind}, lr {rate}": (kind, rate) for kind in ("eps", "v") for rate in RATES},
    DALLE2: {f"{kind}, lr {rate}": (kind, rate) for kind in ("eps", "v") for rate in RATES},
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Heat:
    """One racer's task.

    data: folder of shards, embeddings, their CLIP and arrays; out: folder for what it draws;
    setting: one of its `SETTINGS`; laps: seconds of training after which it draws.
    """

    racer: str
    setting: str
    data: str
    out: str
    laps: tuple[float, ...]
    sampling_seconds: float
    num_pictures: int
    batch_size: int
    num_threads: int
    seed: int


def race(heat: Heat) -> None:
    """Train, draw after each lap, and write drawn_<lap>.npy, uint8 [n, 3, H, W], and laps.json."""
    import torch

    from training.engine.precision import autocast, settled

    torch.set_num_threads(heat.num_threads)
    torch.manual_seed(heat.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    out = Path(heat.out)
    out.mkdir(parents=True, exist_ok=True)
    racers = {OURS: _ours, DIFFUSERS: _diffusers, DALLE2: _dalle2}
    drawing = Arrays.read(Path(heat.data), "test", device).first(heat.num_pictures)
    laps: list[Json] = []
    for lap, trained in enumerate(racers[heat.racer](heat, device)):
        with torch.no_grad(), autocast(device.type, "auto"):
            steps = fitting_steps(trained.draw, drawing, heat.sampling_seconds)
            started = time.perf_counter()
            drawn = [trained.draw(part, steps) for part in drawing.parts(AT_ONCE)]
        seconds = time.perf_counter() - started
        pixels = (torch.cat(drawn).float().clamp(-1, 1) + 1) * 127.5
        np.save(out / f"drawn_{lap}.npy", pixels.round().byte().cpu().numpy())
        laps.append({
            "seconds": trained.seconds, "steps": trained.steps, "sampling_steps": steps,
            "sampling_seconds": seconds, "parameters": trained.parameters,
            "precision": settled("auto", device.type),
        })  # fmt: skip
    (out / "laps.json").write_text(json.dumps(laps))


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A racer after a lap. draw: draws for rows of arrays in so many steps, [n, 3, H, W]."""

    seconds: float
    steps: int
    parameters: int
    draw: Callable[["Arrays", int], Any]


def fitting_steps(draw: Callable[["Arrays", int], Any], rows: "Arrays", seconds: float) -> int:
    """Return how many sampling steps draw all rows in `seconds`, as a few steps of a few show."""
    few = rows.first(AT_ONCE)
    draw(few, MIN_STEPS)
    started = time.perf_counter()
    draw(few, MIN_STEPS)
    each = (time.perf_counter() - started) / MIN_STEPS / len(few)
    return max(MIN_STEPS, min(MAX_STEPS, int(seconds / each / len(rows))))


# -- what all of them read -------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Arrays:
    """Pairs as tensors: key int64 [n], image uint8 [n, 3, H, W], z_i [n, E], z_t [n, E], CLIP's
    states [n, L, W], 0 at padding, and their mask bool [n, L]."""

    key: Any
    image: Any
    image_embed: Any
    text_embed: Any
    states: Any
    mask: Any

    @classmethod
    def read(cls, data: Path, split: str, device: Any) -> "Arrays":
        """Read what `write_arrays` wrote."""
        import torch

        names = [field.name for field in dataclasses.fields(cls)]
        arrays = {name: np.load(data / f"{split}_{name}.npy") for name in names}
        return cls(**{name: torch.from_numpy(x).to(device) for name, x in arrays.items()})

    def __len__(self) -> int:
        return len(self.image)

    def rows(self, rows: Any) -> "Arrays":
        """Return some rows."""
        return Arrays(**{name: value[rows] for name, value in vars(self).items()})

    def first(self, count: int) -> "Arrays":
        """Return the first `count` rows."""
        return self.rows(slice(count))

    def parts(self, size: int) -> Iterator["Arrays"]:
        """Return all rows in order, `size` at a time."""
        return (self.rows(slice(start, start + size)) for start in range(0, len(self), size))

    def batches(self, size: int) -> Iterator["Arrays"]:
        """Return batches for ever, in an order of torch's generator."""
        import torch

        while True:
            for rows in torch.randperm(len(self)).split(size)[: len(self) // size]:
                yield self.rows(rows)


def write_arrays(data: Path, split: str) -> None:
    """Write a split's pictures at `SIZE`, embeddings, and states of its captions, as arrays, in an
    order in which the first rows are a sample of all."""
    import torch

    from eval.sampling.image_source import open_images
    from eval.scores.scorecard import read_embeds
    from ingest.fetching.decode import square_pixels
    from models.convert.runs import load_clip
    from models.tokenizers import token_mask

    clip = load_clip(str(data / "clip"))
    captions, image_embed, text_embed = read_embeds(str(data / f"{split}_embeds"))
    shards = open_images(str(data / split)).shards
    image = np.stack([square_pixels(s.image_bytes(i), SIZE) for s in shards for i in range(len(s))])
    tokens = torch.from_numpy(clip.tokenize(captions))
    states = torch.cat([clip.encode_text(part)[1] for part in tokens.split(256)])
    mask = token_mask(tokens)[:, : states.shape[1]]
    arrays = {
        "key": torch.arange(len(image)), "image": image, "image_embed": image_embed,
        "text_embed": text_embed, "states": states * mask[..., None], "mask": mask,
    }  # fmt: skip
    order = np.random.default_rng(0).permutation(len(image))
    for name, array in arrays.items():
        np.save(data / f"{split}_{name}.npy", np.asarray(array)[order])


def unit_rms(embed: Any) -> Any:
    """Return unit-norm rows [n, E] at unit RMS, as linear layers expect them, as ours does."""
    return embed * embed.shape[1] ** 0.5


def _laps(heat: Heat, step: Callable[[], None]) -> Iterator[tuple[float, int]]:
    """Train; return the seconds and steps at the end of each lap, without what was done there."""
    import torch

    seconds, steps = 0.0, 0
    for lap in heat.laps:
        while seconds < lap:
            started = time.perf_counter()
            step()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds, steps = seconds + time.perf_counter() - started, steps + 1
        yield seconds, steps


# -- ours ------------------------------------------------------------------------------------------


def _ours(heat: Heat, device: Any) -> Iterator[Trained]:
    """Train by training/decoder.py for as many steps as a short trial says, and draw from its
    checkpoints."""
    from cluster.base.jsonl import read_lines
    from models.convert.runs import build_model
    from models.costs import num_parameters
    from models.weights import EMA_NAME, load_config, load_weights

    _train_ours(heat, "trial", TRIAL, TRIAL)
    reports = read_lines(Path(heat.out) / "trial" / "metrics.jsonl")
    a_step = (reports[-1]["seconds"] - reports[2]["seconds"]) / (TRIAL - reports[2]["step"])
    every = max(5, round(heat.laps[0] / a_step / 5) * 5)
    steps = every * max(1, round(heat.laps[-1] / a_step / every))
    _train_ours(heat, "run", steps, every)
    run = Path(heat.out) / "run"
    seconds_at = {line["step"]: line["seconds"] for line in read_lines(run / "metrics.jsonl")}
    for lap in heat.laps:
        at = min(steps, every * max(1, round(lap / a_step / every)))
        folder = run / f"step_{at:08d}"
        decoder: Any = load_weights(build_model(load_config(folder)), folder / EMA_NAME)
        decoder.to(device).eval()
        yield Trained(
            seconds=seconds_at[at], steps=at, parameters=num_parameters(decoder),
            draw=partial(_draw_ours, decoder),
        )  # fmt: skip


def _train_ours(heat: Heat, name: str, steps: int, every: int) -> None:
    data = heat.data
    command = [
        sys.executable, str(ROOT / "training" / "decoder.py"), *_OURS,
        *SETTINGS[OURS][heat.setting], "--images", f"{data}/train",
        "--embeds", f"{data}/train_embeds", "--clip", f"{data}/clip", "--image-size", str(SIZE),
        "--run", f"{heat.out}/{name}", "--train.num-steps", str(steps),
        "--train.checkpoint-every", str(every), "--train.num-threads", str(heat.num_threads),
        "--train.global-batch-size", str(heat.batch_size), "--train.seed", str(heat.seed),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name}: {done.stderr[-2000:]}")


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
    """Train diffusers' unCLIP U-Net with its projections in a plain loop: AdamW, a rate that warms
    up and falls by a cosine, EMA."""
    import torch
    import torch.nn.functional as F
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
    from torch import nn
    from torch.optim.swa_utils import AveragedModel

    from training.engine.precision import autocast

    train = Arrays.read(Path(heat.data), "train", device)
    embed, channels = train.image_embed.shape[1], 48
    unet = UNet2DConditionModel(
        sample_size=SIZE, in_channels=3, out_channels=3,
        down_block_types=("ResnetDownsampleBlock2D", *("SimpleCrossAttnDownBlock2D",) * 2),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=(*("SimpleCrossAttnUpBlock2D",) * 2, "ResnetUpsampleBlock2D"),
        block_out_channels=(channels, 2 * channels, 3 * channels), layers_per_block=1,
        cross_attention_dim=CONTEXT, attention_head_dim=24, norm_num_groups=16,
        resnet_time_scale_shift="scale_shift", class_embed_type="identity",
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

    def averaged_with(means: Any, values: Any, count: Any) -> None:
        decay = min(AVERAGE, (1 + int(count)) / (10 + int(count)))  # the first values fade sooner
        for mean, value in zip(means, values, strict=True):
            mean.lerp_(value, 1 - decay)

    average = AveragedModel(model, multi_avg_fn=averaged_with)
    schedule = DDPMScheduler(num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2")
    (kind, rate), trained = SETTINGS[DIFFUSERS][heat.setting], 0.0
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, fused=True)
    batches = train.batches(heat.batch_size)

    def step() -> None:
        nonlocal trained
        started = time.perf_counter()
        share = min(1.0, trained / heat.laps[-1])
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, share / WARM_UP) * (1 + math.cos(math.pi * share)) / 2
        rows = next(batches)
        x0, count = rows.image.float() / 127.5 - 1, len(rows)
        t: Any = torch.randint(0, 1000, (count,), device=device)
        noise: Any = torch.randn_like(x0)
        drops = torch.tensor([[IMAGE_DROP], [TEXT_DROP]], device=device)
        hidden = torch.rand(2, count, device=device) < drops
        with autocast(device.type, "auto"):
            x_t = schedule.add_noise(x0, noise, t)
            predicted = _predict_diffusers(model, x_t, t, rows, hidden[0], hidden[1])
        target = noise if kind == "eps" else schedule.get_velocity(x0, noise, t)
        F.mse_loss(predicted.float(), target).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        average.update_parameters(model)
        trained += time.perf_counter() - started

    model.train()
    for seconds, steps in _laps(heat, step):
        averaged = copy.deepcopy(average.module).eval()
        yield Trained(
            seconds=seconds, steps=steps, parameters=sum(p.numel() for p in model.parameters()),
            draw=partial(_draw_diffusers, averaged, kind),
        )  # fmt: skip


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


def _draw_diffusers(model: Any, kind: str, rows: Arrays, steps: int) -> Any:
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
    from accelerate import Accelerator  # pyright: ignore[reportMissingImports]
    from dalle2_pytorch import Decoder, DecoderTrainer, Unet  # pyright: ignore

    from training.engine.precision import settled

    train = Arrays.read(Path(heat.data), "train", device)
    embed = train.image_embed.shape[1]
    # where both widths are equal, its Unet skips the projection that makes z_i's tokens, and fails
    width = CONTEXT + 8 * (embed == CONTEXT)
    unet = Unet(
        dim=48, resnet_groups=4, image_embed_dim=embed, text_embed_dim=train.states.shape[-1],
        cond_dim=width, channels=3, dim_mults=(1, 2, 3), self_attn=(False, True, True),
        attn_dim_head=32, attn_heads=4, num_resnet_blocks=1, cond_on_text_encodings=True,
        cond_on_image_embeds=True, max_text_len=train.states.shape[1],
    )  # fmt: skip

    kind, rate = SETTINGS[DALLE2][heat.setting]

    def decoder_of(unet: Any, steps: int | None = None) -> Any:
        return Decoder(
            unet=(unet,), image_sizes=(SIZE,), timesteps=1000, sample_timesteps=steps,
            image_cond_drop_prob=IMAGE_DROP, text_cond_drop_prob=TEXT_DROP, learned_variance=False,
            predict_v=kind == "v",
        ).to(device)  # fmt: skip

    mixed = "bf16" if settled("auto", device.type) == "bf16" else "no"
    trainer = DecoderTrainer(
        decoder_of(unet), lr=rate, ema_beta=AVERAGE,
        ema_update_after_step=0, ema_update_every=1,
        accelerator=Accelerator(cpu=device.type == "cpu", mixed_precision=mixed),
    )  # fmt: skip
    batches = train.batches(heat.batch_size)

    def step() -> None:
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
    for seconds, steps in _laps(heat, step):
        averaged = copy.deepcopy(trainer.ema_unets[0].ema_model)
        yield Trained(
            seconds=seconds, steps=steps, parameters=parameters, draw=partial(draw, averaged)
        )
