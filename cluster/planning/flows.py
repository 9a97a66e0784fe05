"""The stages that are not trained, and what lies on storage: download, embedding, networks."""

import math
from dataclasses import dataclass

from cluster.planning.devices import Gpu
from cluster.planning.efficiency import Efficiency
from cluster.planning.request import PlanRequest
from cluster.planning.stages import Encoder, Stage

DAY = 86_400.0
# img2dataset, 100 machines of 96 vCPUs: 200,000 images a second (its PR 272)
DOWNLOAD_A_VCPU = 200_000 / (100 * 96)
DECODE_SECONDS = 2.4e-3  # CLIP's preprocessing of a 256 px JPEG, a core (benchmarked)
NETWORK_USE = 0.8  # of a card's rate that downloads reach, many small transfers: an assumption
# 10,000 images of 256 px make a shard of 270 MB (laion-prepro, LAION-400M)
IMAGE_BYTES_256 = 270e6 / 10_000
# of 413 M images of LAION-400M, 9.6 M are at least 1024 px on both sides (LAION-400M's statistics)
SHARE_1024 = 9.6 / 413
BITS_A_PIXEL_1024 = 1.5  # of a JPEG of quality 95 at 1024 px, an assumption; 3.3 at 256 px
ASPECT = 4 / 3
KEYS_BYTES = 100  # of a row of keys.parquet, key and caption, compressed: an assumption
CHECKPOINT_BYTES = 4 * (1 + 2 + 1) + 4 + 4  # fragments: master, moments, EMA; model, ema files
INCEPTION_MACS = 5.7e9  # of a 299 px image (Szegedy et al. 2016)


@dataclass(frozen=True, kw_only=True)
class Download:
    """rows: of the URL list; images_per_second: stored, to be done in the days allowed; bound: what
    decides the number of nodes."""

    rows: float
    images_per_second: float
    nodes: int
    bound: str
    days: float
    gbits_per_second: float
    cost: float


def plan_download(request: PlanRequest) -> Download:
    """Return how many nodes the download needs to be done in the days allowed."""
    wanted = request.images / (request.download_days * DAY)
    by_cpu = request.vcpus_per_node * DOWNLOAD_A_VCPU
    by_network = NETWORK_USE * request.node_gbits * 1e9 / 8 / request.fetched_bytes
    a_node = min(by_cpu, by_network)
    nodes = math.ceil(wanted / a_node)
    days = request.images / (nodes * a_node) / DAY
    return Download(
        rows=request.images / request.success,
        images_per_second=nodes * a_node,
        nodes=nodes,
        bound="vCPUs" if by_cpu <= by_network else "network",
        days=days,
        gbits_per_second=nodes * a_node * request.fetched_bytes * 8 / 1e9,
        cost=nodes * request.vcpus_per_node * 24 * days * request.cpu_hour_price,
    )


@dataclass(frozen=True, kw_only=True)
class Embed:
    """images_per_second: of all GPUs; decode_nodes: that keep them fed, beside the GPU nodes."""

    images_per_second: float
    days: float
    gpu_hours: float
    decode_nodes: int
    read_gbits: float
    source: str


def plan_embed(request: PlanRequest, encoder: Encoder, gpu: Gpu, found: Efficiency) -> Embed:
    """Return how long both towers take over all images, and the nodes that decode for them."""
    flops = 2.0 * sum(encoder.macs)
    rate = request.num_gpus * gpu.peak_tflops * 1e12 * found.mfu / flops
    days = request.images / rate / DAY
    return Embed(
        images_per_second=rate,
        days=days,
        gpu_hours=24 * days * request.num_gpus,
        decode_nodes=math.ceil(rate * DECODE_SECONDS / request.vcpus_per_node),
        read_gbits=rate * IMAGE_BYTES_256 * 8 / 1e9,
        source=found.source,
    )


def storage_bytes(request: PlanRequest, encoder: Encoder, stages: list[Stage]) -> dict[str, float]:
    """Return what lies on storage, by what it is."""
    sizes = encoder.sizes
    row = 2 * 2 * sizes["embed_dim"] + 4 * sizes["context_length"] + KEYS_BYTES
    found = {"images of 256 px": request.images * IMAGE_BYTES_256}
    if any(stage.name == "up1024" for stage in stages):
        each = 1024**2 * ASPECT * BITS_A_PIXEL_1024 / 8
        found["images of 1024 px, where the web has them"] = request.images * SHARE_1024 * each
    found["embeddings, tokens and keys"] = request.images * row
    for stage in stages:
        train = stage.config.train
        # while the newest is written, the one it will replace is still there
        kept = train.checkpoint.keep_checkpoints + 1
        found[f"checkpoints of {stage.name}, {kept} at most"] = kept * checkpoint_bytes(stage)
    return found


def checkpoint_bytes(stage: Stage) -> float:
    """Return the size of a checkpoint: fragments, and the weights assembled for inference."""
    return stage.parameters * (CHECKPOINT_BYTES + 4 * len(stage.config.train.averages.power_ema))


def sample_bytes(stage: Stage, encoder: Encoder) -> float:
    """Return what training reads from storage for one sample, beyond its cache."""
    if stage.kind == "prior":
        sizes = encoder.sizes
        return 2 * 2 * sizes["embed_dim"] + 4 * sizes["context_length"] + KEYS_BYTES
    if stage.name == "up1024":
        return 1024**2 * ASPECT * BITS_A_PIXEL_1024 / 8
    return IMAGE_BYTES_256


def decode_seconds(stage: Stage) -> float:
    """Return CPU-seconds that a sample's preparation takes: by area from a 256 px image's."""
    if stage.kind == "prior":
        return 1e-6  # a million embeddings a second and core (benchmarks/results.md)
    return DECODE_SECONDS * (16 if stage.name == "up1024" else 1)
