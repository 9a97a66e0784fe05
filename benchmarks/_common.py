"""The options and the start that all benchmarks share."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.base.cli import parse, run_script

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """Options of every benchmark."""

    quick: bool = False
    """small sizes: the same tables and JSON line within three minutes on two cores; figures of such
    a run say that the script works, not how fast the code is"""


def run_benchmark(config_class: type, main: Callable[[Any], int], **quick: object) -> None:
    """Parse the command line, run `main` with it and exit.

    quick: values that --quick gives to options which the command line leaves at their defaults.
    """

    def start() -> int:
        config, defaults = parse(config_class), config_class()
        if config.quick:
            unset = (name for name in quick if getattr(config, name) == getattr(defaults, name))
            config = dataclasses.replace(config, **{name: quick[name] for name in unset})
        return main(config)

    run_script(start)
