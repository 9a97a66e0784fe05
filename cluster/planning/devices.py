"""The kinds of GPU a plan knows: what the manufacturer says they do, and what an hour is taken to
cost, as gpus.yaml states them."""

from dataclasses import dataclass
from pathlib import Path

from cluster.base.options import nearest, read_yaml

GPUS_PER_NODE = 8  # of the usual machines of such GPUs


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A kind of GPU; gpus.yaml explains the fields."""

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
        """Return bytes a second that each of so many GPUs sends and takes in rings.

        Rings between machines use all their cards, each a part of the bytes.
        """
        return self.link if num_gpus <= self.per_node else min(self.link, self.network)


GPUS = {
    name: Gpu(name=name, **fields)
    for name, fields in read_yaml(Path(__file__).with_name("gpus.yaml")).items()
}


def find_gpu(name: str) -> Gpu:
    """Return the kind of that name; ValueError names the nearest."""
    if name not in GPUS:
        hint = nearest(name.lower(), list(GPUS))
        raise ValueError(f"gpu: found {name!r}, expected one of {', '.join(GPUS)}{hint}")
    return GPUS[name]
