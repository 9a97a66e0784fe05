"""Submit a command to a cluster as a job, and again while the cluster fails it.

    python cluster/supervise.py -- python training/prior.py --preset debug --run "$PWD/runs/job"
    python cluster/supervise.py --name prior --max-attempts 20 -- python training/prior.py ...

It waits while the head is away. A job whose node died, that was killed or that ended incomplete is
submitted again, after a pause; one that refuses its request (exit code 2) is not. Ctrl-C stops the
job. SIGTERM ends this script alone; started again, it follows the job that runs.
"""

import hashlib
import json
import os
import queue
import re
import shlex
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, TypeVar, cast

from cluster.base.cli import (
    DONE,
    DRY_RUN,
    HELP_ALL,
    INCOMPLETE,
    STOPPED_ON_REQUEST,
    WRONG_REQUEST,
    parse,
    require_at_least,
    run_script,
)
from cluster.base.progress import duration

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
POLL_SECONDS = 2.0
CONNECT_SECONDS = 30.0  # for a head that has never answered
ANSWER_SECONDS = 60.0  # for an answer, after which the head counts as away
SUBMIT_SECONDS = 900.0  # the same with a folder to send
STOP_SECONDS = 60.0
HEARD_SECONDS = 10.0  # in which a submission that was broken off may still become a job
PENDING_SECONDS = 30.0  # of a job, after its head has come back: nobody may be starting it
LONGEST_PENDING_SECONDS = 1200.0  # Ray itself gives up after 900, where its head lives
LONGEST_PAUSE_SECONDS = 60.0
RAYS_LINE = "Running entrypoint for job"  # which Ray writes after those of the command
# Exit codes of a command that would end alike again; 126 and 127: the shell found no such program
REFUSED = (WRONG_REQUEST, 126, 127)
Answer = TypeVar("Answer")


@dataclass(frozen=True, kw_only=True)
class SuperviseConfig:
    """Where the command after -- is submitted, and how often."""

    address: str = ""
    """URL of the head's dashboard; empty = RAY_API_SERVER_ADDRESS, else http://127.0.0.1:8265"""
    name: str = ""
    """of the submissions, which get numbers: NAME-1, NAME-2; empty = made from the command"""
    working_dir: str = ""
    """folder to send to the cluster; empty = the job runs where Ray was started"""
    entrypoint_num_gpus: float = 0.0
    """GPUs that the command itself needs; 0 and no resources = it runs on the head"""
    entrypoint_resources: str = ""
    """JSON of the node that the command needs, such as '{"cpu_group": 0.001}': a node other than
    the head, whose death the command then survives"""
    max_attempts: int = 6
    """attempts in a row that may end within --progress-seconds while the head is there"""
    progress_seconds: float = 300.0
    """of running after which an attempt counts as progress"""
    away_seconds: float = 3600.0
    """how long the head may be away"""

    def __post_init__(self) -> None:
        require_at_least(self, max_attempts=1, progress_seconds=0, away_seconds=0)


@dataclass(frozen=True)
class Ending:
    """How an attempt ended; code: that of this script, None = submit again; is_lost: the cluster
    failed it, not the command."""

    reason: str
    code: int | None = None
    is_lost: bool = False


class Head:
    """The head's jobs. Every question waits while the head is away."""

    def __init__(self, address: str, away_seconds: float) -> None:
        self.address, self.away_seconds = address, away_seconds
        self.num_absences, self.back_since = 0, 0.0
        self._client: JobSubmissionClient | None = None

    def ask(
        self, question: "Callable[[JobSubmissionClient], Answer]", seconds: float = ANSWER_SECONDS
    ) -> Answer:
        """Return the head's answer.

        Raises LookupError for a job that it does not know, ValueError for a request that it
        refuses, and OSError where it is away for longer than `away_seconds`.
        """
        from ray.exceptions import AuthenticationError
        from ray.job_submission import JobSubmissionClient
        from ray.util.state.exception import RayStateApiException

        def attempt() -> Answer:
            self._client = self._client or JobSubmissionClient(self.address)
            return question(self._client)

        away_since, is_first, is_counted = 0.0, self._client is None, False
        while True:
            try:
                answer = _within(seconds, attempt)
                break
            except AuthenticationError:
                raise ValueError(
                    f"{self.address}: found no right token, expected the head's in "
                    "~/.ray/auth_token or RAY_AUTH_TOKEN, and RAY_AUTH_MODE=token"
                ) from None
            except (OSError, RuntimeError, RayStateApiException) as error:
                reason = str(error)
                _raise_refusal(reason)
                is_away = isinstance(error, OSError)  # else it answers, if with an error
            now = time.monotonic()
            away_since = away_since or now
            if is_away and not is_counted:
                is_counted = True
                self.num_absences += 1
                if not is_first:
                    print(f"{self.address}: the head does not answer", flush=True)
            if now - away_since > (CONNECT_SECONDS if is_first else self.away_seconds):
                raise OSError(
                    f"{self.address}: found no head within {duration(now - away_since)} "
                    f"({reason[:200]}), expected one; start it, or name its dashboard by --address"
                )
            time.sleep(POLL_SECONDS)
        if is_counted:
            self.back_since = time.monotonic()
            print(f"{self.address}: the head answers", flush=True)
        return answer

    def is_dead(self, node: str) -> bool:
        """Return whether Ray has declared a node dead, or forgotten it."""
        from ray.util.state import get_node

        found = self.ask(lambda client: get_node(node, address=self.address))
        return getattr(found, "state", "DEAD") != "ALIVE"


def _within(seconds: float, call: "Callable[[], Answer]") -> Answer:
    """Return what a call returns; TimeoutError where it takes longer: Ray's client waits for ever
    for a head whose machine lost its power."""
    ended: queue.SimpleQueue[tuple[Answer | None, Exception | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            ended.put((call(), None))
        except Exception as error:  # raised again below
            ended.put((None, error))

    threading.Thread(target=run, daemon=True).start()
    try:
        answer, error = ended.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"no answer within {seconds:.0f} s") from None
    if error is not None:
        raise error
    return cast(Answer, answer)


def _raise_refusal(reason: str) -> None:
    """Raise what an answer of Ray's with a status of 4xx means; other ones are passing, as is what
    a proxy says in the place of a head that is away."""
    status = re.match(r"Request failed with status code (4\d\d): (.*)", reason)
    if status and status[1] == "404":
        if "does not exist" in status[2]:
            raise LookupError(status[2])
    elif status and status[1] not in ("408", "429"):
        raise ValueError(f"job: found status {status[1]}, expected 200: {status[2][:300]}")


def main(config: SuperviseConfig, command: list[str]) -> int:
    """Submit the command until it has succeeded; returns the script's exit code."""
    if not command:
        raise ValueError("found no command, expected one after --")
    address = config.address or os.environ.get("RAY_API_SERVER_ADDRESS") or DEFAULT_ADDRESS
    head = Head(address, config.away_seconds)
    entry, name = shlex.join(command), config.name or _name_of(command)
    number, is_running = _newest(head, name, entry)
    num_quick = 0
    while True:
        number += not is_running
        job, num_absences, began = f"{name}-{number}", head.num_absences, time.monotonic()
        try:
            if is_running:
                print(f"{job}: runs; `ray job logs --follow {job}` shows it", flush=True)
            else:
                _submit(head, config, job, entry)
                print(f"{job}: submitted; `ray job logs --follow {job}` shows it", flush=True)
            ending, worked = _follow(head, job, num_absences)
        except KeyboardInterrupt:
            _stop(head, job)
            raise
        lasted = time.monotonic() - began
        if ending.code is not None:
            print(f"{job}: {ending.reason} after {duration(lasted)}", flush=True)
            return ending.code
        if worked >= config.progress_seconds:
            num_quick = 0
        elif head.num_absences == num_absences:  # what ends with its head says nothing of itself
            num_quick += 1
        if num_quick >= config.max_attempts:
            print(f"{job}: {ending.reason} after {duration(lasted)}; it was the last of "
                  f"{num_quick} attempts without progress", file=sys.stderr)  # fmt: skip
            return INCOMPLETE
        # A command that fails may need time; one that was lost with its node does not
        pause = 1.0 if ending.is_lost else min(2.0**num_quick, LONGEST_PAUSE_SECONDS)
        print(f"{job}: {ending.reason} after {duration(lasted)}; again in {pause:.0f} s",
              flush=True)  # fmt: skip
        time.sleep(pause)
        is_running = False


def _name_of(command: list[str]) -> str:
    script = next((word for word in command if word.endswith(".py")), command[0])
    return f"{Path(script).stem}-{hashlib.sha256(shlex.join(command).encode()).hexdigest()[:8]}"


def _newest(head: Head, name: str, entry: str) -> tuple[int, bool]:
    """Return the number of the newest submission of this name, 0 = there is none, and whether it
    has not ended. Raises ValueError if that one is of another command."""
    numbers: dict[int, JobDetails] = {}
    for info in head.ask(lambda client: client.list_jobs()):
        stem, _, number = (info.submission_id or "").rpartition("-")
        if stem == name and number.isdigit():
            numbers[int(number)] = info
    newest = max(numbers, default=0)
    if not newest or numbers[newest].status.is_terminal():
        return newest, False
    found = numbers[newest].entrypoint
    if found != entry:
        raise ValueError(f"--name {name}: found it running {found!r}, expected {entry!r}")
    return newest, True


def _submit(head: Head, config: SuperviseConfig, job: str, entry: str) -> None:
    """Submit the job; an answer that a dying head did not give makes no second job, because a name
    is taken once."""
    runtime_env = {"working_dir": config.working_dir} if config.working_dir else {}
    try:
        resources = json.loads(config.entrypoint_resources or "{}")
    except json.JSONDecodeError as error:
        raise ValueError(f"--entrypoint-resources: found {error}, expected JSON") from None

    def submit(client: "JobSubmissionClient") -> None:
        try:
            client.submit_job(
                entrypoint=entry, submission_id=job, runtime_env=runtime_env,
                entrypoint_num_gpus=config.entrypoint_num_gpus or None,
                entrypoint_resources=resources or None,
            )  # fmt: skip
        except RuntimeError as error:
            if "already exists" not in str(error):
                raise

    head.ask(submit, SUBMIT_SECONDS if config.working_dir else ANSWER_SECONDS)


def _follow(head: Head, job: str, num_absences: int) -> tuple[Ending, float]:
    """Wait for the end of a job; return it, and the seconds in which the job was seen to run.

    num_absences: of the head, before it was submitted.
    """
    running_since = 0.0
    while True:
        try:
            info = head.ask(lambda client: client.get_job_info(job))
        except LookupError:
            ending = Ending("the head came back without its jobs", is_lost=True)
        else:
            ending = _ending_of(head, job, info, num_absences)
            if info.status.name != "PENDING":
                running_since = running_since or time.monotonic()
        if ending:
            return ending, time.monotonic() - running_since if running_since else 0.0
        time.sleep(POLL_SECONDS)


def _ending_of(head: Head, job: str, info: "JobDetails", num_absences: int) -> Ending | None:
    """Return how a job ended; None while it goes on.

    A head that came back does not by itself notice that a job died with the one before: the job
    "runs" until another is submitted. So its node is looked up.
    """
    if info.status.is_terminal():
        return _final_ending(info)
    if info.status.name == "PENDING":
        waited = time.monotonic() - head.back_since
        is_orphan = head.num_absences > num_absences and waited > PENDING_SECONDS
        age = time.time() - (info.start_time or 0) / 1000
        if is_orphan or age > LONGEST_PENDING_SECONDS:
            head.ask(lambda client: client.stop_job(job))
            return Ending("the head died before it had started it", is_lost=True)
    elif info.driver_node_id and head.is_dead(info.driver_node_id):
        return Ending("its node died", is_lost=True)
    return None


def _final_ending(info: "JobDetails") -> Ending:
    """Return what the end of a job means."""
    lines = [line.strip() for line in (info.message or "").splitlines() if line.strip()]
    own = [line for line in lines if not line.startswith(RAYS_LINE)]
    last, code = own[-1] if own else "", info.driver_exit_code
    if info.status.name == "SUCCEEDED":
        return Ending("succeeded", DONE)
    if info.status.name == "STOPPED":
        return Ending("stopped", INCOMPLETE)
    if code is None:
        return Ending(f"lost ({last[:200]})", is_lost=True)
    if code in REFUSED:
        return Ending(f"refused with exit code {code} ({last[:300]})", WRONG_REQUEST)
    if STOPPED_ON_REQUEST in last:
        return Ending(f"stopped ({last[:300]})", INCOMPLETE)
    return Ending(f"ended with exit code {code} ({last[:300]})")


def _stop(head: Head, job: str) -> None:
    """Stop a job and wait for its end; a head that is away cannot stop it."""
    head.away_seconds = STOP_SECONDS
    try:
        if not _is_stopped(head, job):
            return
    except OSError as error:
        print(f"{job}: {error}; `ray job stop {job}` stops it", file=sys.stderr)
        return
    print(f"{job}: stopped", flush=True)


def _is_stopped(head: Head, job: str) -> bool:
    """Ask the head to stop a job and wait for its end; return whether there was one."""
    began = time.monotonic()
    while True:
        try:
            head.ask(lambda client: client.stop_job(job))
            break
        except LookupError:
            if time.monotonic() - began > HEARD_SECONDS:
                return False
            time.sleep(POLL_SECONDS)
    while not head.ask(lambda client: client.get_job_info(job)).status.is_terminal():
        if time.monotonic() - began > STOP_SECONDS:
            raise OSError(f"it runs {duration(STOP_SECONDS)} after it was to stop")
        time.sleep(0.5)
    return True


def run() -> NoReturn:
    """Read the command line: flags, then the command after --."""
    at = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    flags, command = sys.argv[1:at], sys.argv[at + 1 :]
    if "--" not in sys.argv and not {"-h", "--help", HELP_ALL, DRY_RUN} & set(flags):
        flags = []  # a command without its --, of which main says what is missing
    run_script(lambda: main(parse(SuperviseConfig, argv=flags), command))


if __name__ == "__main__":
    run()
