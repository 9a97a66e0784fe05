"""Captions to draw: a text file, JSON lines with a prompt each, or the captions of image shards.

a caption a line                                  T2I-CompBench's *_val.txt, and your own
{"prompt": "a photo of two clocks", ...} a line   GenEval's evaluation_metadata.jsonl
"""

import json
from pathlib import Path

MAX_CHARACTERS = 10_000  # of a caption; encoders read some 300


def read_captions(source: str, limit: int = 0) -> list[str]:
    """Return the captions of `source` in its order; limit: only the first, 0 = all.

    Raises ValueError for a file that is no text, a line without a prompt, and no captions at all.
    """
    path = Path(source)
    if path.is_dir():
        from eval.sampling.image_source import open_images

        captions = open_images(source).captions
    elif path.is_file():
        captions = _read_file(path)
    else:
        raise ValueError(
            f"{source}: found no such file or folder, expected captions, one a line, or image "
            "shards"
        )
    if not captions:
        raise ValueError(f"{source}: found no captions, expected at least one")
    return captions[: limit or None]


def _read_file(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: found bytes that are no UTF-8 text ({error.reason})") from None
    is_json = path.suffix.lower() in (".jsonl", ".json")
    captions = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}: line {number}"
        caption = _prompt_of(where, line) if is_json else line.strip()
        if len(caption) > MAX_CHARACTERS or "\0" in caption:
            raise ValueError(
                f"{where}: found {len(caption)} characters, expected a caption of at most "
                f"{MAX_CHARACTERS}, without null bytes"
            )
        captions.append(caption)
    return captions


def _prompt_of(where: str, line: str) -> str:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: found {error.msg}, expected JSON with a prompt") from None
    prompt = record.get("prompt") if isinstance(record, dict) else None
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(f"{where}: prompt: found {prompt!r}, expected text")
    return prompt.strip()
