"""training/prior.py, each step of which takes a while; run by test_training_bucket_ray.py."""

import os
import time

from cluster.base.cli import parse, run_script
from training.config import PriorRunConfig
from training.runs.worker import launch
from training.tasks.prior import build_prior

SECONDS = float(os.environ.get("SECONDS_A_STEP", "0.5"))


def build_slow(config: PriorRunConfig) -> object:
    """Build the prior; its objective waits before each step."""
    import dataclasses

    task = build_prior(config)

    def objective(model, batch):
        time.sleep(SECONDS)
        return task.objective(model, batch)

    return dataclasses.replace(task, objective=objective)


if __name__ == "__main__":
    from training.data.inputs import prepare_data

    def main() -> int:
        config = prepare_data(parse(PriorRunConfig))
        return launch(config, config.run, "_slow_prior:build_slow", "prior")

    run_script(main)
