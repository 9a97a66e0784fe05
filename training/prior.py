"""Train a prior: from a caption to the CLIP image embedding of a picture of it.

python training/prior.py --embeds data/embeds --run runs/prior
python training/prior.py --preset debug            # seconds on a CPU, makes its own data
ray job submit --working-dir . -- python training/prior.py --preset debug --run /shared/runs/prior
"""

from cluster.cli import parse, run_script
from training.config import PRESETS, PriorRunConfig


def main(config: PriorRunConfig) -> int:
    """Train, or continue, the run that `config` describes."""
    from cluster.metrics import serve
    from training.data_sets import prepare_data
    from training.prior_job import build_prior, prior_model
    from training.sizing import dry_run
    from training.worker import launch

    if config.dry_run:
        return dry_run(config, prior_model)
    serve(config.metrics_port)
    config = prepare_data(config)
    return launch(config, config.run, build_prior, "prior")


if __name__ == "__main__":
    run_script(lambda: main(parse(PriorRunConfig, presets=PRESETS / "prior")))
