"""Training on simulated nodes that lose workers, raylets and drivers.

benchmarks/recovery.py does it, and checks after each run that it ended with the samples of an
undisturbed one at every step, and with its weights, bit for bit where the number of workers stays.
"""

import json
from pathlib import Path

import pytest
from _runs import done, script


def campaign(keep: Path, *arguments: str, timeout: float) -> dict:
    """Run the benchmark; return its figures, or fail with what its runs have said."""
    ended = done(script("benchmarks/recovery.py", *arguments, "--keep", keep), timeout)
    logs = [path.read_text()[-1500:] for path in sorted(keep.glob("*.txt"))]
    assert ended.returncode == 0, "\n".join([ended.stdout, ended.stderr[-3000:], *logs])
    print(ended.stdout)  # pytest -s shows the table
    return json.loads(ended.stdout.splitlines()[-1])


@pytest.mark.soak
def test_a_run_that_loses_a_worker_a_raylet_and_its_driver_ends_as_if_it_had_not(tmp_path: Path):
    found = campaign(
        tmp_path, "--faults", "writing", "raylet", "driver", "--together", "--repeats", "1",
        "--steps-a-fault", "60", timeout=900,
    )  # fmt: skip
    assert found["lawful"] == {"together": True}
    assert [len(found[kind]["seconds"]) for kind in ("writing", "raylet", "driver")] == [1, 1, 1]


@pytest.mark.soak
@pytest.mark.parametrize(
    ("kind", "repeats"),
    [("worker", 5), ("raylet", 5), ("driver", 5), ("hang", 3), ("elastic", 1), ("writing", 20),
     ("damaged", 6)],
)  # fmt: skip
def test_a_run_under_one_kind_of_fault_ends_as_if_undisturbed(
    kind: str, repeats: int, tmp_path: Path
):
    found = campaign(tmp_path, "--faults", kind, "--repeats", str(repeats), timeout=5400)
    assert found["lawful"] == {kind: True} and len(found[kind]["seconds"]) == repeats
