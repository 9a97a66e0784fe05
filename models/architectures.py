"""open_clip's architectures by their names: configuration, preprocessing, tokenizer, weights.

Everything is found on this machine: a name whose files are absent is an error that says how to
fetch them.
"""

import json
import logging
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from models.tokenizers import TokenizerConfig
from models.weights import JsonObject

HUB, FOLDER = "hf-hub:", "local-dir:"  # open_clip's prefixes of repositories and folders
CONFIG = "open_clip_config.json"
WEIGHTS = (  # of a repository or folder, in open_clip's order
    "open_clip_model.safetensors", "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin", "open_clip_pytorch_model.pth", "model.safetensors",
)  # fmt: skip
PREPROCESSING = ("mean", "std", "interpolation", "resize_mode")


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """One of open_clip's models. name: as open_clip takes it; model: its sizes; preprocessing: of
    pixels, {} = OpenAI's; folder: that describes it, None = open_clip's own; weights: those that
    come with it, None = none."""

    name: str
    model: JsonObject
    preprocessing: JsonObject
    folder: Path | None = None
    weights: Path | None = None

    @property
    def tokenizer(self) -> TokenizerConfig:
        """What open_clip.get_tokenizer takes from the configuration."""
        text = self.model["text_cfg"]
        source = text.get("hf_tokenizer_name") or ""
        options = dict(text.get("tokenizer_kwargs") or {})
        if source and text.get("tokenizer_mode"):
            options["tokenizer_mode"] = text["tokenizer_mode"]
        if source and self.name.startswith(FOLDER):
            source = str(self.folder)  # which has the files
        return TokenizerConfig(
            context_length=int(text.get("context_length", 77)),
            source=source,
            options=json.dumps(options, sort_keys=True),
        )

    def create(self) -> nn.Module:
        """Build the model, untrained."""
        import open_clip

        text, name = dict(self.model["text_cfg"]), self.name
        if repository := text.get("hf_model_name"):
            if not Path(repository).is_dir():
                found = cached(repository, ("config.json",))
                if found is None:
                    raise ValueError(
                        f"clip {name}: found no configuration of its text tower {repository} on "
                        f"this machine, expected it in Hugging Face's cache; {fetching(name)}"
                    )
                text["hf_model_name"] = str(found.parent)
            text["hf_model_pretrained"] = False
        before = logging.root.manager.disable
        logging.disable(logging.WARNING)  # "Model initialized randomly": it is not known yet
        try:
            return open_clip.create_model(
                f"{FOLDER}{self.folder}" if self.folder else name, load_weights=False,
                pretrained_text=False, text_cfg=text, force_preprocess_cfg=self.preprocessing,
            )  # fmt: skip
        finally:
            logging.disable(before)

    def pretrained(self, tag: str) -> "Architecture":
        """Return this one with the weights and the preprocessing of a tag of open_clip's.

        Raises ValueError for an unknown tag, and for weights that are not on this machine.
        """
        import open_clip

        config: JsonObject = open_clip.get_pretrained_cfg(self.name, tag)
        tags = open_clip.list_pretrained_tags_by_model(self.name)
        if not config:
            expected = f"one of {', '.join(tags)}, or a" if tags else "random or a"
            raise ValueError(
                f"clip {self.name}:{tag}: found tag {tag!r}, expected {expected} file of weights "
                "(.safetensors, .pt, .bin)"
            )
        hub, address = config.get("hf_hub", ""), config.get("url", "")
        repository, _, file = hub.rpartition("/")
        path = Path.home() / ".cache" / "clip" / address.rpartition("/")[2]
        if hub:
            safe = (file.rpartition(".")[0] + ".safetensors",) if file else WEIGHTS
            path = cached(repository, (*safe, *([file] if file else [])))
        if path is None or not path.is_file():
            raise ValueError(
                f"clip {self.name}:{tag}: found no weights of it on this machine, expected them in "
                f"open_clip's cache; {fetching(self.name, tag)}"
            )
        if bool(config.get("quick_gelu")) != bool(self.model.get("quick_gelu")):
            which = "QuickGELU" if config.get("quick_gelu") else "GELU"
            print(
                f"clip {self.name}:{tag}: weights trained with {which}, which this architecture "
                "does not compute; open_clip has both, one under the name that ends in -quickgelu",
                file=sys.stderr,
            )
        preprocessing = {key: config[key] for key in PREPROCESSING}
        return replace(self, preprocessing=preprocessing, weights=path)


def find_architecture(name: str) -> Architecture:
    """Return the architecture that open_clip knows by a name: one of its own, hf-hub:REPOSITORY or
    local-dir:FOLDER. ValueError where there is none on this machine."""
    import open_clip

    if name.startswith((HUB, FOLDER)):
        return _of_folder(name)
    name = name.replace("/", "-")  # OpenAI's spelling, as open_clip reads it
    model = open_clip.get_model_config(name)
    if model is None:
        raise ValueError(
            f"clip architecture: found {name!r}, expected a name of open_clip.list_models()"
        )
    # A file of weights says nothing of its pixels: what all published weights agree in
    tags = [
        open_clip.get_pretrained_cfg(name, tag)
        for tag in open_clip.list_pretrained_tags_by_model(name)
    ]
    choices = [{key: tag[key] for key in PREPROCESSING} for tag in tags]
    agree = bool(choices) and all(choice == choices[0] for choice in choices)
    return Architecture(name=name, model=model, preprocessing=choices[0] if agree else {})


def _of_folder(name: str) -> Architecture:
    """Return the architecture that a folder, or a repository in Hugging Face's cache, describes."""
    if name.startswith(HUB):
        path = cached(name.removeprefix(HUB), (CONFIG,))
        if path is None:
            raise ValueError(
                f"clip {name}: found no {CONFIG} of it on this machine, expected it in Hugging "
                f"Face's cache; {fetching(name)}"
            )
        folder = path.parent
    else:
        folder = Path(name.removeprefix(FOLDER)).absolute()
        if not (folder / CONFIG).is_file():
            raise ValueError(f"clip {name}: found no {CONFIG}, expected one in this folder")
    config: JsonObject = json.loads((folder / CONFIG).read_text())
    if not {"embed_dim", "vision_cfg", "text_cfg"} <= config.get("model_cfg", {}).keys():
        raise ValueError(f"{folder / CONFIG}: found no model_cfg, expected open_clip's sizes")
    weights = next((folder / file for file in WEIGHTS if (folder / file).is_file()), None)
    if weights is None:
        hint = f"; {fetching(name)}" if name.startswith(HUB) else ""
        raise ValueError(f"clip {name}: found no weights, expected {WEIGHTS[0]}{hint}")
    preprocessing = config.get("preprocess_cfg", {})
    return Architecture(
        name=name if name.startswith(HUB) else f"{FOLDER}{folder.name}",
        model=config["model_cfg"],
        preprocessing={key: preprocessing[key] for key in PREPROCESSING if key in preprocessing},
        folder=folder,
        weights=weights,
    )


def cached(repository: str, names: Iterable[str]) -> Path | None:
    """Return the first of these files of a repository that is in Hugging Face's cache, or None."""
    from huggingface_hub import try_to_load_from_cache

    found = (try_to_load_from_cache(repository, name) for name in names)
    return next((Path(path) for path in found if isinstance(path, str)), None)


def fetching(name: str, tag: str = "") -> str:
    """Return the words that say how to fetch an encoder, its tokenizer included."""
    arguments = f"'{name}', '{tag}'" if tag else f"'{name}'"
    code = f"import open_clip as o; o.create_model({arguments}); o.get_tokenizer('{name}')"
    return f'nothing is downloaded here, fetch it with: python -c "{code}"'
