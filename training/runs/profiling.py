"""A profiler over a window of steps, and what share of a device's peak a run uses."""

from pathlib import Path

import torch

from cluster.base.run_dir import PROFILE_FOLDER

# dense bf16 teraFLOPs a second without sparsity, by the manufacturers' data sheets
PEAK_TFLOPS = {
    "B200": 2250.0,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "L4": 121.0,
    "A10G": 70.0,
    "RTX 4090": 165.0,
}


def peak_tflops(device: torch.device) -> float:
    """Return the peak of a GPU that the table knows, by its name; 0 for any other device."""
    if device.type != "cuda":
        return 0.0
    name = torch.cuda.get_device_name(device)
    return next((peak for model, peak in PEAK_TFLOPS.items() if model in name), 0.0)


def window(text: str) -> range:
    """Return the steps of "first:count"; none for an empty text. Raises ValueError for others."""
    if not text:
        return range(0)
    try:
        first, count = map(int, text.split(":"))
    except ValueError:
        first = count = -1
    if first < 0 or count < 1:
        raise ValueError(f'train.profile: found {text!r}, expected "first:count" such as 20:3')
    return range(first, first + count)


class Profiler:
    """Profiles a window of a rank's steps into <run>/profile/rank_0000.json."""

    def __init__(self, run: Path, text: str, rank: int) -> None:
        self._steps, self._path = window(text), run / PROFILE_FOLDER / f"rank_{rank:04d}.json"
        self._running: torch.profiler.profile | None = None

    def begin(self, step: int) -> None:
        """Start where the window does, or where the run continues inside it."""
        if self._running is None and step in self._steps:
            self._running = torch.profiler.profile(record_shapes=True)
            self._running.start()

    def end(self, step: int, *, last: bool) -> None:
        """Write the trace once `step`, of 0, 1, ..., was the window's last or the run's."""
        if self._running is not None and (last or step + 1 not in self._steps):
            self._running.stop()
            self._path.parent.mkdir(exist_ok=True)
            self._running.export_chrome_trace(str(self._path))
            self._running = None
