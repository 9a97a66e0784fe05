"""The options of a plan, and the chains of presets that it knows."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from cluster.base.options import Option, merged, read_yaml, require_bounds
from models.configs import token_side

EngineName = Literal["deepspeed", "fsdp2"]
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

    chain: Literal["paper", "karlo", "modern", "modern_dit", "mini", "demo", "debug"] = "paper"
    """models of every stage: presets of training/presets of that name"""
    prior: Literal["diffusion", "autoregressive"] = "diffusion"
    """kind of prior"""
    train_clip: bool = False
    """train the encoder as well, instead of taking one that is there"""
    gpu: str = "h200"
    """kind of GPU: a100-40, a100-80, h100, h200, b200, l40s, or cpu (two cores)"""
    engine: EngineName = "deepspeed"
    """who reduces gradients and partitions the state: DeepSpeed, or torch's FSDP2, which gathers
    weights in bf16 beside the forward pass; --train.engine of the training scripts"""
    num_gpus: Annotated[int, Option(least=1, most=100_000)] = 64
    """GPUs"""
    images: Annotated[float, Option(least=1, most=1e12)] = 250e6
    """images that the download is to store"""
    image_tokens: Annotated[int, Option(least=1, most=1024)] = 1
    """tokens of each image that ingest/embed.py --image-tokens keeps; counted on storage alone"""
    caption_tokens: Annotated[int, Option(least=0, most=256)] = 0
    """tokens of a caption that networks read; 0 = all they have room for, as the paper's figures
    are; training reads what a batch's longest caption needs"""
    mfu: Annotated[float, Option(least=0, most=1)] = 0.0
    """share of the GPU's peak that training reaches; 0 = the measured or published one of each kind
    of network"""
    effective_tflops: Annotated[float, Option(least=0, most=10_000)] = 0.0
    """teraFLOPs a second that training reaches on each GPU, instead of mfu; 0 = by mfu"""
    measured: str = ""
    """file of measured speeds, one JSON object a line as benchmarks/preset_step.py prints; empty =
    benchmarks/measured.jsonl of the project, where there is one"""
    headroom: Annotated[float, Option(least=0, most=0.9)] = 0.1
    """share of a GPU's memory left to kernels' workspaces, NCCL and the allocator"""
    gpu_hour_price: Annotated[float, Option(least=0, most=1e4)] = 0.0
    """dollars for a GPU and hour; 0 = an assumption by kind, no offer"""
    cpu_hour_price: Annotated[float, Option(least=0, most=1e3)] = 0.05
    """dollars for a vCPU and hour, of the nodes that download and decode"""
    budget: Annotated[float, Option(least=0, most=1e12)] = 0.0
    """dollars to spend; 0 = any. A plan that costs more ends with exit code 1"""
    download_days: Annotated[float, Option(least=0.01, most=3650)] = 7.0
    """days the download may take, which decides how many nodes it needs"""
    vcpus_per_node: Annotated[int, Option(least=1, most=1024)] = 32
    """vCPUs of a node that downloads and decodes"""
    node_gbits: Annotated[float, Option(least=0.01, most=10_000)] = 10.0
    """network of such a node in Gb/s"""
    fetched_bytes: Annotated[float, Option(least=1, most=1e9)] = 250e3
    """bytes of an image on the web, mean"""
    success: Annotated[float, Option(least=0.001, most=1)] = 0.75
    """share of the list's rows that end as a stored image"""
    storage_gbytes: Annotated[float, Option(least=0.001, most=1e5)] = 5.0
    """GB/s that the shared storage writes, for checkpoints"""
    node_mtbf_hours: Annotated[float, Option(least=0.1, most=1e9)] = NODE_MTBF_HOURS
    """hours between failures of one node, mean; 6,335 in Llama 3's 54 days"""
    restart_seconds: Annotated[float, Option(least=0, most=86_400)] = 300.0
    """from a failure to the next step: noticing, new workers, reading the checkpoint"""
    repair_hours: Annotated[float, Option(least=0, most=24 * 365)] = 4.0
    """hours until a failed node is back"""
    spare_nodes: Annotated[int, Option(least=0, most=100_000)] = 0
    """spare nodes"""
    elastic: bool = True
    """continue on fewer nodes while no spare is left, where waiting would cost more"""
    eval_images: Annotated[int, Option(least=0, most=1e9)] = 30_000
    """images drawn for the evaluation"""
    json: bool = False
    """print JSON instead of tables"""
    validate: bool = False
    """compare the planner with runs that others have published, and stop; exit code 1 where one is
    off by more than 25 %"""

    def __post_init__(self) -> None:
        require_bounds(self)
        token_side(self.image_tokens)
        if self.mfu and self.effective_tflops:
            raise ValueError(
                f"effective_tflops: found {self.effective_tflops:g} with mfu {self.mfu:g}, "
                "expected one of them"
            )
