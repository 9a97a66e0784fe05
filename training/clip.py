"""Train a CLIP, the encoder of captions and images, on image shards.

    python training/clip.py --images data/images --run runs/clip
    python training/clip.py --preset debug             # seconds on a CPU, makes its own data
"""

from cluster.base.cli import parse, run_script
from training.config import PRESETS, ClipRunConfig

BUILD = "training.tasks.clip:build_clip_task"


def main(config: ClipRunConfig) -> int:
    """Train, or continue, the run that `config` describes."""
    from training.runs.dry_run import dry_run, on_meta
    from training.tasks.clip import clip_model

    if config.dry_run:
        return dry_run(config, clip_model)
    from cluster.base.metrics import serve
    from training.data.inputs import prepare_data
    from training.runs.worker import launch

    serve(config.metrics_port)
    config = prepare_data(config)
    on_meta(config, clip_model)  # sizes that do not fit are refused before there is a run
    return launch(config, config.run, BUILD, "clip")


if __name__ == "__main__":
    run_script(lambda: main(parse(ClipRunConfig, presets=PRESETS / "clip")))
