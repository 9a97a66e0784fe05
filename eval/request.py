"""What an evaluation compares, as a command line states it."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import UseAppendAction

from cluster.base.cli import Option, require_at_least, require_local

if TYPE_CHECKING:
    from eval.sampling.chain import Model

Space = Literal["clip", "inception", "inception_clean", "dinov2", "efficientnet_lite0"]


@dataclass(frozen=True, kw_only=True)
class EvalRequest:
    """Every score is written with its features and its number of images."""

    real: str = "data/images"
    """real images: committed shards, a folder, or statistics: an npz, or a folder of them"""
    fake: str = "samples"
    """generated images: a folder of eval/sample.py, or any of those; with --captions or a model for
    --protocol, where they are drawn"""
    features: tuple[Space, ...] = ()
    """spaces of the distances, the headline's first; FID proper is inception's; the weights of
    efficientnet_lite0 are installed; empty = the protocol's, or clip"""
    image_size: int = 0
    """crop the centre square of all images and resize it to this side in px; 0 = as they are"""
    weights_dir: str = ""
    """folder of published weights; empty = that of MINIDALLE2_WEIGHTS; nothing is ever
    downloaded"""
    inception_weights: str = ""
    """other weights of the Inception, whose digest the score is then named after"""
    inception_sha256: str = ""
    """their sha256"""
    dinov2_weights: str = ""
    """other weights of DINOv2, whose digest the score is then named after"""
    dinov2_sha256: str = ""
    """their sha256"""
    dinov2_model: str = "vit_large_patch14_dinov2"
    """size of DINOv2, as timm calls it"""
    clip: str = ""
    """encoder of CLIP features and of the CLIP score; empty = runs/clip for --features clip, and no
    CLIP score for others"""
    scorer: Annotated[str, Option(name="judge")] = ""
    """another CLIP to score with than the model was trained on; overrides --clip"""
    embeds: str = ""
    """embeddings of the real images: adds the scores of CLIP and, with --prior, of the chain"""
    train: str = ""
    """images that the model was trained on: adds nearest training neighbours"""
    prior: str = ""
    """finished prior, for its own scores and the ablation, with --embeds; to draw, with --captions
    or --protocol"""
    decoder: str = ""
    """finished base decoder, for the ablation and to draw; with --prior"""
    upsampler: Annotated[tuple[str, ...], UseAppendAction] = ()
    """finished upsampler; repeatable; with --decoder"""
    model: str = ""
    """folder with the runs prior, base and up..., in place of the three"""
    captions: str = ""
    """draw these into --fake first: a text file, a caption a line (T2I-CompBench's); JSON lines
    with a prompt each (GenEval's); or image shards"""
    limit: int = 0
    """draw only the first captions; 0 = all"""
    seed: int | None = None
    """of the noise of what is drawn; none = the protocol's, or 0"""
    sampling: str = ""
    """how to draw: a JSON file of eval/sample.py's options, or a settings.json of its samples;
    empty = its defaults"""
    protocol: str = ""
    """coco30k, shapes, emoji or a JSON file: states captions, real images, size and seed"""
    protocol_data: str = ""
    """folder of the protocol's data; empty = where the protocol states"""
    num_resamples: int = 50
    """bootstrap resamples of the generated images, for an interval; 0 = none"""
    save_statistics: str = ""
    """folder to write the statistics of the real images to, an npz a space"""
    features_dir: str = ""
    """folder of features, by which a rerun continues; empty = one beside --out"""
    num_workers: int = 0
    """Ray actors that draw and extract; 0 = this process; scores do not depend on the number"""
    out: str = "eval.json"
    """file of the scores"""
    device: str = "auto"
    """auto: a GPU where there is one; cpu, cuda or cuda:N"""
    num_threads: int | None = None
    """threads on the CPU, of each worker; None: the cores of this machine, shared by the workers"""
    fresh: bool = False
    """delete earlier features, and samples where they are drawn, instead of continuing"""

    def runs(self) -> "Model":
        """Return the runs that draw, from --model or one by one."""
        from eval.sampling.chain import Model, model_in

        if not self.model:
            return Model(prior=self.prior, decoder=self.decoder, upsampler=self.upsampler)
        if self.prior or self.decoder or self.upsampler:
            raise ValueError(
                "--model: found it with --prior, --decoder or --upsampler, expected one"
            )
        return model_in(Path(self.model))

    def check(self) -> "Model":
        """Raise ValueError for an option that has no effect without another; return the runs."""
        require_local("--out", self.out)
        require_local("--features-dir", self.features_dir)
        require_local("--save-statistics", self.save_statistics)
        model, to_draw = self.runs(), self.captions or self.protocol
        if model.decoder:
            require_local("--fake", self.fake)  # samples are drawn there
        for name, other, present in (
            ("upsampler", "--decoder", model.decoder),
            ("decoder", "--prior", model.prior),
            ("prior", "--embeds, --captions or --protocol", self.embeds or to_draw),
        ):
            if getattr(model, name) and not present:
                raise ValueError(
                    f"--{name}: found it without {other}, expected both; add {other} or leave out "
                    f"--{name}"
                )
        if self.captions and not model.decoder:
            raise ValueError("--captions: found it without --model, expected what is to draw them")
        if self.captions and self.protocol:
            raise ValueError(
                "--captions: found it with --protocol, which has its own, expected one"
            )
        if self.protocol and self.limit:
            raise ValueError(
                f"--limit: found {self.limit} with --protocol, which states how many, expected 0; "
                "--captions draws fewer"
            )
        for name in ("limit", "seed", "sampling"):
            if getattr(self, name) and not (to_draw and model.decoder):
                raise ValueError(f"--{name}: found it without anything to draw; leave it out")
        require_at_least(self, limit=0, num_threads=1, num_workers=0)
        if self.protocol_data and not self.protocol:
            raise ValueError("--protocol-data: found it without --protocol, expected both")
        if self.num_resamples < 0 or self.num_resamples == 1:
            raise ValueError(f"--num-resamples: found {self.num_resamples}, expected 0, 2 or more")
        return model
