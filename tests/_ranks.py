"""Ranks as processes of a test's own file, without Ray."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from training import loop


def run_ranks(file: str, root: Path, world_size: int, calls: list) -> None:
    """Let `world_size` processes of `file`, which ends in `rank_main`, do `calls`."""
    meeting = root / f"meeting_{len(list(root.glob('meeting_*')))}"
    meeting.mkdir()
    arguments = [str(root), str(meeting), str(world_size), json.dumps(calls)]
    outputs = [(meeting / f"{rank}.txt").open("w") for rank in range(world_size)]
    processes = [
        subprocess.Popen([sys.executable, file, str(rank), *arguments], stdout=out, stderr=out)
        for rank, out in enumerate(outputs)
    ]
    try:
        codes = [process.wait(timeout=600) for process in processes]
    finally:
        for process, output in zip(processes, outputs, strict=True):
            process.kill()
            output.close()
    logs = [(meeting / f"{rank}.txt").read_text()[-3000:] for rank in range(world_size)]
    assert codes == [0] * world_size, "\n\n".join(logs)


def rank_main(act: Callable[[Path, list], None]) -> None:
    """Join the other ranks and do `act(root, calls)`; results are read a step late, as on GPUs."""
    loop.QUEUED = ("cpu",)
    rank, root, meeting, world_size, calls = sys.argv[1:]
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=world_size, DS_ACCELERATOR="cpu")
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{meeting}/store", rank=int(rank), world_size=int(world_size)
    )
    act(Path(root), json.loads(calls))
    dist.barrier()
    dist.destroy_process_group()
