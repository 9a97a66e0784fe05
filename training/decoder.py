"""Train one stage of the cascade: the base decoder, or an upsampler.

    python training/decoder.py --images data/images --embeds data/embeds --run runs/base
    python training/decoder.py --preset debug          # seconds on a CPU, makes its own data
"""

from cluster.base.cli import parse, run_script
from training.config import PRESETS, DecoderRunConfig

BUILD = "training.tasks.decoder:build_decoder"


def main(config: DecoderRunConfig) -> int:
    """Train, or continue, the run that `config` describes."""
    from training.runs.dry_run import dry_run, on_meta
    from training.tasks.networks import decoder_model

    if config.dry_run:
        return dry_run(config, decoder_model)
    from cluster.base.metrics import serve
    from training.data.inputs import prepare_data
    from training.runs.worker import launch

    serve(config.metrics_port)
    config = prepare_data(config)
    on_meta(config, decoder_model)  # sizes that do not fit are refused before there is a run
    name = "decoder" if config.stage == "base" else config.stage
    return launch(config, config.run, BUILD, name)


if __name__ == "__main__":
    run_script(lambda: main(parse(DecoderRunConfig, presets=PRESETS / "decoder")))
