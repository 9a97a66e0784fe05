"""The kinds of GPU a plan knows: what the manufacturer says they do, and what an hour is taken to
cost."""

import difflib
from dataclasses import dataclass

GPUS_PER_NODE = 8  # of the usual machines of such GPUs


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A kind of GPU, in a machine of eight of its kind.

    peak_tflops: dense bf16 teraFLOPs a second; memory_gib: what the driver reports; bandwidth,
    link, network: bytes a second of its memory, to a GPU of the same machine, and of the machine's
    network cards for each GPU, one way; hour_price: dollars, an assumption and no offer;
    generation: whose measured efficiency it takes (cluster/planning/efficiency.py).
    """

    name: str
    peak_tflops: float
    memory_gib: float
    bandwidth: float
    link: float
    network: float
    hour_price: float
    generation: str
    source: str
    per_node: int = GPUS_PER_NODE

    @property
    def memory_bytes(self) -> float:
        """Memory in bytes."""
        return self.memory_gib * 2**30

    def wire(self, num_gpus: int) -> float:
        """Return bytes a second that each of so many GPUs sends and takes in a ring."""
        return self.link if num_gpus <= self.per_node else min(self.link, self.network)


# Memory is what nvidia-smi reports, in MiB / 1024: less than the name says where ECC takes
# some. The link is half of NVLink's figure, which counts both ways; of the L40S PCIe 4.0 x16. The
# network is a DGX's: a 200 Gb/s card for each A100, a 400 Gb/s card for each H100 and later; of the
# L40S one 200 Gb/s card for two.
_GB = 1e9
_GPUS = (
    Gpu(name="a100-40", peak_tflops=312.0, memory_gib=39.6, bandwidth=1555 * _GB, link=300 * _GB,
        network=25 * _GB, hour_price=1.60, generation="ampere", source="NVIDIA A100 data sheet"),
    Gpu(name="a100-80", peak_tflops=312.0, memory_gib=80.0, bandwidth=2039 * _GB, link=300 * _GB,
        network=25 * _GB, hour_price=2.00, generation="ampere", source="NVIDIA A100 data sheet"),
    Gpu(name="h100", peak_tflops=989.0, memory_gib=79.6, bandwidth=3350 * _GB, link=450 * _GB,
        network=50 * _GB, hour_price=3.00, generation="hopper",
        source="NVIDIA H100 SXM data sheet"),
    Gpu(name="h200", peak_tflops=989.0, memory_gib=140.4, bandwidth=4800 * _GB, link=450 * _GB,
        network=50 * _GB, hour_price=3.50, generation="hopper", source="NVIDIA H200 data sheet"),
    Gpu(name="b200", peak_tflops=2250.0, memory_gib=179.1, bandwidth=8000 * _GB, link=900 * _GB,
        network=50 * _GB, hour_price=5.50, generation="blackwell",
        source="NVIDIA DGX B200 data sheet"),
    Gpu(name="l40s", peak_tflops=362.0, memory_gib=45.0, bandwidth=864 * _GB, link=25 * _GB,
        network=12.5 * _GB, hour_price=1.20, generation="ada", source="NVIDIA L40S data sheet"),
    # Two cores of an AMD EPYC with AVX2, "2z" of benchmarks/results.md: 2 cores x 16 fp32
    # multiply-adds x 2 FLOPs x 3 GHz; memory is shared, the network a cloud machine's.
    Gpu(name="cpu", peak_tflops=0.192, memory_gib=24.0, bandwidth=20 * _GB, link=1.25 * _GB,
        network=1.25 * _GB, hour_price=0.10, generation="cpu",
        source="two cores of benchmarks/results.md", per_node=1),
)  # fmt: skip
GPUS = {gpu.name: gpu for gpu in _GPUS}


def find_gpu(name: str) -> Gpu:
    """Return the kind of that name; ValueError names the nearest."""
    if name in GPUS:
        return GPUS[name]
    near = difflib.get_close_matches(name.lower(), GPUS, n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise ValueError(f"gpu: found {name!r}, expected one of {', '.join(GPUS)}{hint}")
