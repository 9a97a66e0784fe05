"""Real stages in one process that Prometheus is to watch; run by test_cluster_watch.py.

python tests/_stages.py FOLDER PORT URL_LIST SITE       # begins at a line of input, ends with it

Downloads from the site, trains a prior until somebody makes FOLDER/run/stop, draws, evaluates.
"""

import sys
from pathlib import Path

from cluster.base.cli import parse, run_script
from cluster.base.metrics import serve
from cluster.base.timings import Timings
from training.config import PRESETS, PriorRunConfig


def main(folder: Path, port: int, urls: str, site: str) -> int:
    """Run the stages; each prints its name when it is done."""
    from eval import fid, sample
    from ingest import download
    from training import prior

    serve(port)
    sys.stdin.readline()  # of whoever has seen the counters at 0: what grew before is no growth
    timings = Timings(folder / "timings.json")
    data, chain = folder / "data", folder / "chain"
    parts = [
        "--prior", str(chain / "prior"), "--decoder", str(chain / "decoder"),
        "--upsampler", str(chain / "upsampler"),
    ]  # fmt: skip
    fetched = ["--urls", urls, "--out", str(folder / "fetched"), "--allow-address", site]
    fetched += ["--num-processes", "0", "--samples-per-shard", "4", "--host-rate", "0"]
    trained = ["--preset", "debug", "--embeds", str(data / "embeds"), "--run", str(folder / "run")]
    trained += ["--validation", str(data / "embeds"), "--train.num-workers", "0"]
    trained += ["--train.num-steps", "1000000", "--train.report-every", "1"]
    trained += ["--train.checkpoint-every", "20", "--train.peak-tflops", "0.001"]
    trained += ["--train.global-batch-size", "8"]
    drawn = ["--captions", str(data / "images"), "--out", str(folder / "samples")]
    drawn += ["--limit", "8", "--decoder-steps", "2", *parts]
    judged = ["--real", str(data / "images"), "--fake", str(folder / "samples")]
    judged += ["--embeds", str(data / "embeds"), "--clip", "tiny:random", *parts[:2]]
    judged += ["--out", str(folder / "eval.json")]
    stages = {
        "download": lambda: download.main(parse(download.DownloadConfig, argv=fetched)),
        "prior": lambda: prior.main(
            parse(PriorRunConfig, presets=PRESETS / "prior", argv=trained)
        ),
        "sample": lambda: sample.main(parse(sample.SampleConfig, argv=drawn)),
        "evaluate": lambda: fid.main(parse(fid.FidConfig, argv=judged)),
    }
    for name, run in stages.items():
        with timings.attempt(name, name) as attempt:
            run()
            attempt.done = True
        print(f"done: {name}", flush=True)
    sys.stdin.read()
    return 0


if __name__ == "__main__":
    run_script(lambda: main(Path(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:]))
