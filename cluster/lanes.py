"""Commands of a pipeline that run side by side, in lanes."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from cluster.base.cli import DONE, INCOMPLETE

ASK_SECONDS = 1.0  # between two requests to stop


@dataclass(frozen=True, kw_only=True)
class Command:
    """One stage of the pipeline, and the number of images that it handles.

    needs: the commands whose products it reads, beside those before it in a lane. output, inputs:
    for a script that cannot tell by itself that it is done, the file that it
    writes last, and the files whose change makes that one out of date.
    """

    name: str
    script: str
    arguments: tuple[str, ...]
    num_images: int
    needs: tuple[str, ...] = ()
    output: Path | None = None
    inputs: tuple[Path, ...] = ()


def run_lanes(
    lanes: list[list[Command]], run: Path, run_command: Callable[[Command], int]
) -> int:
    """Run lanes side by side, the first in this thread, which handles signals; a command waits for
    those that it needs. Returns an exit code.

    run: the folder whose subfolders are the trainings, by the names of their commands. Where a lane
    ends early, the training of the others stops at a checkpoint.
    """
    from training.runs.signals import request_stop

    ended = {command.name: threading.Event() for lane in lanes for command in lane}
    running: dict[str, None] = {}
    failed = threading.Event()

    def run_in_turn(lane: list[Command]) -> int:
        for command in lane:
            for name in command.needs:
                ended[name].wait()
            if failed.is_set():
                return INCOMPLETE
            running[command.name] = None
            try:
                code = run_command(command)
            finally:
                del running[command.name]
            if code:
                return code
            ended[command.name].set()
        return DONE

    def give_up(lane: list[Command]) -> None:
        failed.set()
        for command in lane:
            ended[command.name].set()  # nobody waits for what does not come
        while others := list(running):
            for folder in (run / name for name in others):
                if folder.is_dir():
                    request_stop(folder)
            time.sleep(ASK_SECONDS)  # again: a run that is being launched forgets the request

    def run_lane(lane: list[Command]) -> int:
        code = INCOMPLETE
        try:
            code = run_in_turn(lane)
        finally:
            if code:
                give_up(lane)
        return code

    with ThreadPoolExecutor(max(1, len(lanes) - 1)) as pool:
        others = [pool.submit(run_lane, lane) for lane in lanes[1:]]
        codes = [run_lane(lanes[0])]
        codes += [other.result() for other in others]
    return next(filter(None, codes), DONE)
