"""Train a CLIP on image shards: the encoder that the rest of the system stands on.

python training/clip.py --images data/images --run runs/clip
python training/clip.py --preset debug             # seconds on a CPU, makes its own data
"""

from cluster.cli import parse, run_script
from training.config import PRESETS, ClipRunConfig


def main(config: ClipRunConfig) -> int:
    """Train, or continue, the run that `config` describes."""
    from cluster.metrics import serve
    from training.data_sets import prepare_data
    from training.jobs import build_clip_job, clip_model
    from training.sizing import dry_run
    from training.worker import launch

    if config.dry_run:
        return dry_run(config, clip_model)
    serve(config.metrics_port)
    config = prepare_data(config)
    return launch(config, config.run, build_clip_job, "clip")


if __name__ == "__main__":
    run_script(lambda: main(parse(ClipRunConfig, presets=PRESETS / "clip")))
