"""Opens a trained chain from its run folders."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.base.files import Json, digest_file
from eval.features.devices import device_named
from models.convert.runs import absolute_spec, load_clip
from models.unclip import UnClip
from models.weights import EMA_NAME, FINAL_NAME, exported, load_config
from training.engine.precision import compute_whole_fp32


@dataclass(frozen=True, kw_only=True)
class Model:
    """The finished runs that generate images, and the run that guides them."""

    prior: str = ""
    decoder: str = ""
    upsampler: tuple[str, ...] = ()
    guide: str = ""
    clip: str = ""

    @property
    def runs(self) -> tuple[str, str, tuple[str, ...], str]:
        """Prior, decoder, upsamplers and guide."""
        return self.prior, self.decoder, self.upsampler, self.guide

    def absolute(self) -> "Model":
        """Return the same runs by paths that mean the same in any process."""
        upsampler = tuple(map(absolute_spec, self.upsampler))
        others = {n: absolute_spec(getattr(self, n)) for n in ("prior", "decoder", "guide", "clip")}
        return Model(**others, upsampler=upsampler)

    def load(self, device: str) -> UnClip:
        """Load the runs; see `load_chain`."""
        runs = (self.clip, self.prior, self.decoder, self.upsampler)
        return load_chain(*runs, guide=self.guide, device=device)


def model_in(folder: Path) -> Model:
    """Return the model of a folder with the finished runs prior, base and up, up256, ...

    Raises ValueError if there is no prior or no base.
    """
    for name in ("prior", "base"):
        if not (folder / name / FINAL_NAME).is_file():
            raise ValueError(
                f"--model: found no finished run {folder / name}, expected prior and base; name "
                "the runs by --prior, --decoder and --upsampler"
            )
    runs = [path.parent for path in folder.glob(f"up*/{FINAL_NAME}")]
    order = sorted(runs, key=lambda run: (len(run.name), run.name))  # up256 before up1024
    runs = {"prior": str(folder / "prior"), "decoder": str(folder / "base")}
    return Model(**runs, upsampler=tuple(map(str, order)))


def load_chain(
    clip: str, prior: str, decoder: str, upsamplers: Sequence[str], *, guide: str = "",
    device: str = "cpu",
) -> UnClip:  # fmt: skip
    """Load finished runs; `clip` empty means the encoder that the prior, or without one the
    decoder, was trained on; `decoder` empty the prior alone, `prior` empty none."""
    compute_whole_fp32()
    where = device_named(device)
    spec = clip or load_config(exported(prior or decoder))["clip"]
    return UnClip.load(load_clip(spec), prior, decoder, tuple(upsamplers), guide).to(where)


def chain_weights(prior: str, decoder: str, upsamplers: Sequence[str], guide: str = "") -> Json:
    """Identify the weights of finished runs by content, since a path may be trained again.

    Returns {prior_weights, decoder_weights: {step, sha256}, upsampler_weights: a list of such}, and
    guide_weights where there is one: the exported step, and the sha256 of its averaged weights.
    """
    return {
        **({"guide_weights": run_weights(guide)} if guide else {}),
        "prior_weights": run_weights(prior),
        "decoder_weights": run_weights(decoder),
        "upsampler_weights": [run_weights(run) for run in upsamplers],
    }


def run_weights(run: str) -> dict[str, str]:
    """Identify the weights of one finished run: {step, sha256}, as `chain_weights` does."""
    step = exported(run)
    return {"step": step.name, "sha256": digest_file(step / EMA_NAME)}
