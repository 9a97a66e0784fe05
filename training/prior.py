"""Train a prior: from a caption to the CLIP image embedding of a picture of it.

    python training/prior.py --embeds data/embeds --run runs/prior
    python training/prior.py --preset debug            # seconds on a CPU, makes its own data
    ray job submit --working-dir . -- python training/prior.py --run /shared/prior
"""

from cluster.base.cli import parse, run_script
from training.config import PRESETS, PriorRunConfig

BUILD = "training.tasks.prior:build_prior"


def main(config: PriorRunConfig) -> int:
    """Train, or continue, the run that `config` describes."""
    from training.runs.dry_run import dry_run, on_meta
    from training.tasks.networks import prior_model

    if config.dry_run:
        return dry_run(config, prior_model)
    from cluster.base.metrics import serve
    from training.data.inputs import prepare_data
    from training.runs.worker import launch

    serve(config.metrics_port)
    config = prepare_data(config)
    on_meta(config, prior_model)  # sizes that do not fit are refused before there is a run
    return launch(config, config.run, BUILD, "prior")


if __name__ == "__main__":
    run_script(lambda: main(parse(PriorRunConfig, presets=PRESETS / "prior")))
