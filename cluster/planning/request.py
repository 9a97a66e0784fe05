"""The options of a plan, and the chains of presets that it knows."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cluster.base.options import merged, read_yaml

PRESETS = Path(__file__).parent / "presets"
# unexpected stops of a node in a 54-day snapshot of 16,384 GPUs, 2,048 nodes: 419
# (Dubey et al. 2024, The Llama 3 Herd of Models, section 3.3.4)
LLAMA_NODES, LLAMA_DAYS, LLAMA_STOPS = 2048, 54, 419
NODE_MTBF_HOURS = 24 * LLAMA_DAYS * LLAMA_NODES / LLAMA_STOPS  # 6,335


@dataclass(frozen=True, kw_only=True)
class Chain:
    """The models of a plan; chains.yaml explains the fields."""

    encoder: str
    prior: str
    decoders: tuple[str, ...]
    ar: str = ""
    sample_steps: tuple[int, ...] = (16, 16, 8, 8)  # the defaults of eval/sample.py
    passes_per_step: tuple[float, float] = (2, 2)


CHAINS: dict[str, Chain] = {
    name: merged(Chain(encoder="", prior="", decoders=()), fields, name)
    for name, fields in read_yaml(Path(__file__).with_name("chains.yaml")).items()
}


@dataclass(frozen=True, kw_only=True)
class PlanRequest:
    """What a cluster would need to make a model of the paper's kind, and how long it would take."""

    chain: Literal["paper", "karlo", "modern", "mini", "demo", "debug"] = "paper"
    """models of every stage: presets of training/presets of that name"""
    prior: Literal["diffusion", "autoregressive"] = "diffusion"
    """kind of prior"""
    train_clip: bool = False
    """train the encoder as well, instead of taking one that is there"""
    gpu: str = "h200"
    """kind of GPU: a100-40, a100-80, h100, h200, b200, l40s, or cpu (two cores)"""
    num_gpus: int = 64
    """GPUs"""
    images: float = 250e6
    """images that the download is to store"""
    caption_tokens: int = 0
    """tokens of a caption that networks read; 0 = all they have room for, as the paper's figures
    are; training reads what a batch's longest caption needs"""
    mfu: float = 0.0
    """share of the GPU's peak that training reaches; 0 = the measured or published one of each kind
    of network"""
    effective_tflops: float = 0.0
    """teraFLOPs a second that training reaches on each GPU, instead of mfu; 0 = by mfu"""
    measured: str = ""
    """file of measured speeds, one JSON object a line as benchmarks/preset_step.py prints; empty =
    benchmarks/measured.jsonl of the project, where there is one"""
    headroom: float = 0.1
    """share of a GPU's memory left to kernels' workspaces, NCCL and the allocator"""
    gpu_hour_price: float = 0.0
    """dollars for a GPU and hour; 0 = an assumption by kind, no offer"""
    cpu_hour_price: float = 0.05
    """dollars for a vCPU and hour, of the nodes that download and decode"""
    budget: float = 0.0
    """dollars to spend; 0 = any. A plan that costs more ends with exit code 1"""
    download_days: float = 7.0
    """days the download may take, which decides how many nodes it needs"""
    vcpus_per_node: int = 32
    """vCPUs of a node that downloads and decodes"""
    node_gbits: float = 10.0
    """network of such a node in Gb/s"""
    fetched_bytes: float = 250e3
    """bytes of an image on the web, mean"""
    success: float = 0.75
    """share of the list's rows that end as a stored image"""
    storage_gbytes: float = 5.0
    """GB/s that the shared storage writes, for checkpoints"""
    node_mtbf_hours: float = NODE_MTBF_HOURS
    """hours between failures of one node, mean; 6,335 in Llama 3's 54 days"""
    restart_seconds: float = 300.0
    """from a failure to the next step: noticing, new workers, reading the checkpoint"""
    repair_hours: float = 4.0
    """hours until a failed node is back"""
    spare_nodes: int = 0
    """spare nodes"""
    elastic: bool = True
    """continue on fewer nodes while no spare is left, where waiting would cost more"""
    eval_images: int = 30_000
    """images drawn for the evaluation"""
    json: bool = False
    """print JSON instead of tables"""

    def __post_init__(self) -> None:
        for name, least, most in _LIMITS:
            value = getattr(self, name)
            if not math.isfinite(value) or not least <= value <= most:
                raise ValueError(f"{name}: found {value:g}, expected {least:g} to {most:g}")
        if self.mfu and self.effective_tflops:
            raise ValueError(
                f"effective_tflops: found {self.effective_tflops:g} with mfu {self.mfu:g}, "
                "expected one of them"
            )


_LIMITS = (
    ("num_gpus", 1, 100_000),
    ("images", 1, 1e12),
    ("caption_tokens", 0, 256),
    ("mfu", 0, 1),
    ("effective_tflops", 0, 10_000),
    ("headroom", 0, 0.9),
    ("gpu_hour_price", 0, 1e4),
    ("cpu_hour_price", 0, 1e3),
    ("budget", 0, 1e12),
    ("download_days", 0.01, 3650),
    ("vcpus_per_node", 1, 1024),
    ("node_gbits", 0.01, 10_000),
    ("fetched_bytes", 1, 1e9),
    ("success", 0.001, 1),
    ("storage_gbytes", 0.001, 1e5),
    ("node_mtbf_hours", 0.1, 1e9),
    ("restart_seconds", 0, 86_400),
    ("repair_hours", 0, 24 * 365),
    ("spare_nodes", 0, 100_000),
    ("eval_images", 0, 1e9),
)
