"""Fixtures shared by the tests: a small web on the loopback device, small data, a small untrained
chain."""

import dataclasses
import http.server
import io
import json
import runpy
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from models.clip import FrozenClip
from models.configs import (
    AutoregressivePriorConfig,
    DecoderConfig,
    DiffusionPriorConfig,
    RegressionPriorConfig,
    UNetConfig,
    UpsamplerConfig,
)
from models.decoder import Decoder
from models.priors.autoregressive import AutoregressivePrior
from models.priors.diffusion import DiffusionPrior
from models.priors.regression import RegressionPrior
from models.tokenizers import VOCAB_SIZE
from models.upsampler import Upsampler
from models.weights import FINAL_NAME, save_config, save_weights
from training.data import demo_data

Handler = http.server.BaseHTTPRequestHandler
THREADS = torch.get_num_threads()  # as OMP_NUM_THREADS has it


@pytest.fixture(autouse=True)
def as_many_threads_as_before() -> None:
    """Undo what a command that ran in this process has set: tests run side by side, and more
    threads than cores make one that computes thirty times as long."""
    torch.set_num_threads(THREADS)


@pytest.fixture
def run_here(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str, str]]:
    """Return a function that runs a script of the project, named by its path in the repository, in
    this process; it returns the exit code and what the script wrote to stdout and stderr."""

    def run(script: str, *arguments: str) -> tuple[int, str, str]:
        path = str(Path(__file__).parent.parent / script)
        monkeypatch.setattr(sys, "argv", [path, *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            runpy.run_path(path, run_name="__main__")
        return int(caught.value.code or 0), *capsys.readouterr()

    return run


class Site:
    """A server on a loopback address with answers by path.

    `hits` lists the paths asked for, without /robots.txt, which `robots_hits` counts.
    """

    def __init__(self, port: int, host: str = "127.0.0.1") -> None:
        self.host, self.port, self.hits, self.robots_hits = host, port, list[str](), 0
        self.answers: dict[str, Callable[[Handler], None]] = {}

    @staticmethod
    def picture(width: int = 48, height: int = 40, red: int = 200) -> bytes:
        """Return a PNG of one colour."""
        buffer = io.BytesIO()
        Image.new("RGB", (width, height), (red, 40, 40)).save(buffer, "PNG")
        return buffer.getvalue()

    @property
    def address(self) -> str:
        """HOST:PORT, as --allow-address takes it."""
        return f"{self.host}:{self.port}"

    def url(self, path: str) -> str:
        """Return the URL of a path."""
        return f"http://{self.address}{path}"

    @staticmethod
    def answer(
        body: bytes = b"",
        *,
        status: int = 200,
        kind: str = "image/png",
        headers: dict[str, str] | None = None,
    ) -> Callable[[Handler], None]:
        """Return what answers with a body."""
        given = {"Content-Type": kind, "Content-Length": str(len(body)), **(headers or {})}

        def send(handler: Handler) -> None:
            handler.send_response(status)
            for name, value in given.items():
                handler.send_header(name, value)
            handler.end_headers()
            handler.wfile.write(body)

        return send

    def put(self, path: str, body: bytes = b"", **answer: Any) -> str:
        """Answer `path` with a body; return its URL."""
        self.answers[path] = self.answer(body, **answer)
        return self.url(path)


@contextmanager
def serve_site(host: str = "127.0.0.1") -> Iterator[Site]:
    """Run a site until the block ends."""

    class Answering(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = 10

        def do_GET(self) -> None:
            if self.path == "/robots.txt":
                site.robots_hits += 1
            else:
                site.hits.append(self.path)
            answer = site.answers.get(self.path)
            if answer is None:
                self.send_error(404)
            else:
                answer(self)

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    class Server(http.server.ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: object, client_address: object) -> None:
            """Say nothing: tests hang up, and kill those who asked."""

    server = Server((host, 0), Answering)
    site = Site(server.server_address[1], host)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield site
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def site() -> Iterator[Site]:
    """A site to be fetched from."""
    with serve_site() as found:
        yield found


@pytest.fixture
def canary() -> Iterator[Site]:
    """A private service that nothing allows: it must never see a request."""
    with serve_site("127.0.0.2") as found:
        found.put("/", Site.picture())
        yield found
        assert found.hits == [] and found.robots_hits == 0


@pytest.fixture(scope="session")
def write_data() -> Callable[..., Path]:
    """Return a function that draws shards of shapes to `root`/images and embeds them to
    `root`/embeds, with an untrained encoder and `image_tokens` of each image; it returns `root`."""

    def write(
        root: Path, *, num_shards: int, samples_per_shard: int, image_tokens: int = 1
    ) -> Path:
        demo_data.draw_images(
            root / "images", num_shards=num_shards, samples_per_shard=samples_per_shard
        )
        clip, tokens = "tiny:random", image_tokens
        demo_data.embed_here(str(root / "images"), root / "embeds", clip, image_tokens=tokens)
        return root

    return write


def _finished(run: Path, model: nn.Module, config: dict) -> Path:
    """Write what the last checkpoint of a run leaves for inference."""
    step = run / "step_00000004"
    step.mkdir(parents=True)
    save_weights(step / "ema.safetensors", model.state_dict())
    save_config(step, config)
    (run / FINAL_NAME).write_text(json.dumps({"step": step.name}))
    return run


def _prior(kind: str, sizes: dict[str, int], image_tokens: int) -> tuple[Any, nn.Module]:
    small: Any = {"width": 16, "depth": 1, "num_heads": 2}
    if kind == "diffusion":
        config = DiffusionPriorConfig(**small, image_tokens=image_tokens)
        return config, DiffusionPrior(config, **sizes)
    if kind == "regression":
        config = RegressionPriorConfig(**small)
        return config, RegressionPrior(config, **sizes)
    own: Any = {"text_tokens": 16, "text_width": 16, "text_depth": 1, "text_heads": 2}
    config = AutoregressivePriorConfig(**small, **own, num_codes=5, codebook_size=16)
    return config, AutoregressivePrior(config, **sizes, vocab_size=VOCAB_SIZE)


@pytest.fixture(scope="session")
def write_chain() -> Callable[..., dict[str, Path]]:
    """Return a function that writes an untrained prior, decoder and upsampler for the embeddings
    of `clip`, as finished runs: to twice `image_size` px; image_tokens: of prior and decoder."""

    def write(
        root: Path, clip: FrozenClip, image_size: int = 8, kind: str = "diffusion",
        image_tokens: tuple[int, int] = (1, 1),
    ) -> dict[str, Path]:  # fmt: skip
        torch.manual_seed(0)
        sizes = {"embed_dim": clip.embed_dim, "text_width": clip.text_width}
        prior_sizes = {**sizes, "context_length": clip.context_length}
        prior, prior_model = _prior(kind, prior_sizes, image_tokens[0])
        unet = UNetConfig(channels=8, channel_mult=(1,), num_res_blocks=1, attn_resolutions=())
        base = DecoderConfig(unet=unet, context_width=8, image_tokens=image_tokens[1])
        up = UpsamplerConfig(unet=unet)
        decoder_sizes = {**sizes, "image_size": image_size}
        up_sizes = {"factor": 2, "crop_size": 8}
        saved_up = {**up_sizes, "image_size": 2 * image_size}
        models = {
            "prior": (prior_model, prior, f"{kind}_prior", prior_sizes),
            "decoder": (Decoder(base, **decoder_sizes), base, "decoder", decoder_sizes),
            "upsampler": (Upsampler(up, **up_sizes), up, "upsampler", saved_up),
        }
        runs = {}
        for name, (model, config, kind, more) in models.items():
            for parameter in model.parameters():  # last layers start at zero, and would say nothing
                nn.init.normal_(parameter, std=0.1)
            saved = {"kind": kind, "model": dataclasses.asdict(config), "clip": "tiny:random"}
            saved |= {"encoder_id": clip.encoder_id, **more}
            runs[name] = _finished(root / name, model, saved)
        return runs

    return write
