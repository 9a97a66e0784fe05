"""A process that kills itself at a chosen call: no clock decides when."""

import os
import signal
from collections.abc import Callable, Iterator
from typing import Any


def dying(owner: Any, name: str, calls: Iterator[int], moment: int) -> Callable:
    """Return the function `name` of a module or class, which kills its process just before or just
    after the call that is the moment-th of `calls`, two for each."""
    real = getattr(owner, name)

    def call(*arguments: Any, **more: Any) -> Any:
        if next(calls) == moment:
            os.kill(os.getpid(), signal.SIGKILL)
        found = real(*arguments, **more)
        if next(calls) == moment:
            os.kill(os.getpid(), signal.SIGKILL)
        return found

    return call
