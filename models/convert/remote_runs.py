"""Finished runs on other storage: the Hub (hf://user/name), or any that fsspec reaches.

What sampling, encoders and --init read of a run comes over: final.json, config.json, the averaged
weights. The copy lies below $MINIDALLE2_CACHE, ~/.cache/minidalle2 where it is not set, and may be
deleted at any time. A run that has changed gets another copy.
"""

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from models.weights import CONFIG_NAME, EMA_NAME, FINAL_NAME

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

HUB = "hf://"
TOKEN_HINT = "private ones need `hf auth login` or HF_TOKEN"


def is_remote_run(run: str | os.PathLike[str]) -> bool:
    """Return whether a run is named by a URL."""
    return "://" in os.fspath(run)


def fetched_run(url: str) -> Path:
    """Return the folder of a copy of a finished run that a URL names.

    Raises ValueError where there is none, and OSError where the storage does not answer.
    """
    with _connection(url):
        return _fetched_run(url)


def _fetched_run(url: str) -> Path:
    files, root = _filesystem(url)
    try:
        step = json.loads(files.cat_file(f"{root}/{FINAL_NAME}"))["step"]
        if not re.fullmatch(r"step_\d{8}", step):
            raise ValueError(f"{url}: step: found {step!r} in {FINAL_NAME}, expected step_00001000")
        names = [f"{step}/{name}" for name in (CONFIG_NAME, EMA_NAME)]
        stamps = [files.ukey(f"{root}/{name}") for name in names]
    except FileNotFoundError:
        hint = f"; {TOKEN_HINT}" if url.startswith(HUB) else ""
        raise ValueError(f"{url}: found no finished run, expected {FINAL_NAME}{hint}") from None
    key = hashlib.sha256(json.dumps([url, step, *stamps]).encode()).hexdigest()[:32]
    cache = Path(os.environ.get("MINIDALLE2_CACHE") or "~/.cache/minidalle2").expanduser()
    copies = cache / ".runs"  # hidden from the cache of shards, which deletes what is old
    folder = copies / key
    if (folder / FINAL_NAME).is_file():
        return folder

    # The copy appears complete or not at all; of two processes that make it, one is enough
    copies.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(dir=copies, prefix=".part_"))
    try:
        (part / step).mkdir()
        for name in names:
            files.get_file(f"{root}/{name}", str(part / name))
        (part / FINAL_NAME).write_text(json.dumps({"step": step}))
        try:
            part.rename(folder)
        except OSError:
            if not (folder / FINAL_NAME).is_file():
                raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder


def push_files(files: dict[str, bytes | Path], url: str, *, message: str) -> None:
    """Write files, by their names, to a URL: one commit on the Hub, of a repository that only its
    user sees until she opens it; elsewhere a folder that must be new, final.json last.

    Raises ValueError without a token of the Hub, or for a folder that is not new; OSError where the
    storage does not take them.
    """
    if url.startswith(HUB):
        _push_to_hub(files, url, message)
        return
    with _connection(url):
        _push_to_folder(files, url)


def _push_to_folder(files: dict[str, bytes | Path], url: str) -> None:
    target, root = _filesystem(url)
    if target.exists(f"{root}/{FINAL_NAME}"):
        raise ValueError(f"--push: found a run at {url}, expected none; name another URL")
    for name in sorted(files, key=lambda name: name == FINAL_NAME):
        content = files[name]
        if isinstance(content, bytes):
            target.pipe_file(f"{root}/{name}", content)
        else:
            target.put_file(str(content), f"{root}/{name}")


def _push_to_hub(files: dict[str, bytes | Path], url: str, message: str) -> None:
    from huggingface_hub import CommitOperationAdd, HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError

    repository, _, revision = url.removeprefix(HUB).partition("@")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise ValueError(f"--push: found {url}, expected {HUB}user/name or {HUB}user/name@revision")
    if get_token() is None:
        raise ValueError("--push: found no token of the Hub, expected `hf auth login` or HF_TOKEN")
    api = HfApi()
    operations = [
        CommitOperationAdd(path_in_repo=name, path_or_fileobj=content)
        for name, content in files.items()
    ]
    try:
        api.create_repo(repository, private=True, exist_ok=True)
        api.create_commit(
            repository, operations, commit_message=message, revision=revision or None
        )
    except HfHubHTTPError as error:
        line = str(error).splitlines()[0]
        if error.response.status_code in (401, 403):
            message = f"--push: the Hub refuses the token for {repository}: {line}"
            raise ValueError(message) from None
        raise OSError(f"{url}: {line}") from error


@contextmanager
def _connection(url: str) -> Iterator[None]:
    """Turn the errors of a store's library, other than OSError, into a ConnectionError."""
    try:
        yield
    except (OSError, ValueError):
        raise
    except Exception as error:  # each library has its own base class
        raise ConnectionError(f"{url}: {error}") from error


def _filesystem(url: str) -> "tuple[AbstractFileSystem, str]":
    """Return the storage of a URL and the path there.

    Raises ValueError for a URL of an unknown kind.
    """
    import fsspec.core

    try:
        files, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise ValueError(f"{url}: cannot be reached: {error}") from None
    return files, path.rstrip("/")
