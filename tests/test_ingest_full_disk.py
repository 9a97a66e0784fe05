"""A disk that fills up in a download: a clear line, nothing half, and with room a rerun ends."""

import os
import random
import shutil
import subprocess

import pytest
from _lists import digests, download_command, is_whole, write_list
from PIL import Image

from ingest.shards import load_snapshot

NUM_ROWS = 40
# In a user's own mount namespace: a small disk, a run that fills it, more room, the same run.
SCRIPT = """
set -u
out=$1 kept=$2; shift 2
mkdir -p "$out" "$kept"
mount -t tmpfs -o "size=$SIZE" tmpfs "$out" || exit 99
"$@" > "$kept/first.txt" 2>&1; echo $? > "$kept/first.code"
cp -a "$out" "$kept/full"
mount -o remount,size=64m "$out" || exit 99
"$@" > "$kept/second.txt" 2>&1; echo $? > "$kept/second.code"
cp -a "$out" "$kept/whole"
"""


def can_mount() -> bool:
    unshare = shutil.which("unshare")
    command = [unshare or "", "-rm", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    return bool(unshare) and subprocess.run(command, capture_output=True).returncode == 0


@pytest.mark.skipif(not can_mount(), reason="unshare (Debian: util-linux) may not mount here")
@pytest.mark.parametrize("size", [pytest.param("60k", marks=pytest.mark.slow), "400k"])
def test_a_full_disk_is_reported_and_a_rerun_with_room_completes(site, tmp_path, size: str):
    draw = random.Random(0)
    urls = []
    for i in range(NUM_ROWS):
        noise = Image.frombytes("RGB", (64, 64), draw.randbytes(64 * 64 * 3))
        path = tmp_path / "noise.png"
        noise.save(path)
        urls.append(site.put(f"/{i}.png", path.read_bytes()))
    kept, out = tmp_path / "kept", str(tmp_path / "out")
    command = download_command(
        site, write_list(tmp_path / "l.parquet", urls), out, "--image-size", 64,
        "--samples-per-shard", 8, "--num-processes", 0,
    )  # fmt: skip
    command = ["unshare", "-rm", "bash", "-c", SCRIPT, "script", out, str(kept), *command]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env={**os.environ, "SIZE": size}
    )
    assert done.returncode == 0, done.stderr
    first, second = (kept / "first.txt").read_text(), (kept / "second.txt").read_text()
    assert (kept / "first.code").read_text().strip() == "1", first
    assert f"No space left on device: make room in {tmp_path / 'out'}" in first
    assert "rerun the same command" in first and "Traceback" not in first
    half, whole = digests(kept / "full"), digests(kept / "whole")
    assert len(half) < NUM_ROWS // 8 and is_whole(kept / "full")
    assert (kept / "second.code").read_text().strip() == "0", second
    assert half.items() <= whole.items() and is_whole(kept / "whole")
    assert load_snapshot(kept / "whole").num_samples == NUM_ROWS
