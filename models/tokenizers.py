"""Captions as tokens: CLIP's byte-pair encoding, and the tokenizers of other text towers."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

VOCAB_SIZE = 49408  # of CLIP's BPE; the last two are start and end of text


def tokenizer(
    context_length: int, vocab_size: int = VOCAB_SIZE, **options: object
) -> Callable[[list[str]], np.ndarray]:
    """Return a function from captions to int32 [B, context_length]: BPE tokens, zero-padded, cut
    at the end.

    A smaller `vocab_size` folds token ids onto each other; 0 stays padding, and the last two stay
    start and end. options: of open_clip's SimpleTokenizer.
    """
    from open_clip import SimpleTokenizer

    tokenize = SimpleTokenizer(context_length=context_length, **options)  # pyright: ignore

    def fold(tokens: np.ndarray) -> np.ndarray:
        folded = 1 + (tokens - 1) % (vocab_size - 3)
        special = tokens - VOCAB_SIZE + vocab_size
        return np.where(tokens == 0, 0, np.where(tokens >= VOCAB_SIZE - 2, special, folded))

    def encode(captions: list[str]) -> np.ndarray:
        tokens = tokenize(captions).numpy().astype(np.int32)
        return tokens if vocab_size == VOCAB_SIZE else fold(tokens)

    return encode


def token_mask(tokens: Tensor) -> Tensor:
    """Return bool [B, L], True where `tokens` are real: up to the last that is not 0.

    0 pads; before the end of a caption it is CLIP's "!" within a run of punctuation.
    """
    return (tokens != 0).int().flip(1).cummax(1).values.flip(1).bool()


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """How captions become an encoder's tokens.

    context_length: tokens; vocab_size: fewer than CLIP's fold its BPE; source: folder or Hugging
    Face repository of another tokenizer, "" = CLIP's BPE; options: open_clip's, as JSON.
    """

    context_length: int
    vocab_size: int = VOCAB_SIZE
    source: str = ""
    options: str = "{}"


class Tokenizer:
    """From captions to an encoder's tokens int32 [B, context_length], in which 0 pads.

    Ids of a tokenizer that pads with another id than 0 are one higher here, so that everything that
    reads stored tokens finds their padding; `ids` returns them as the text tower knows them. Where
    the end of text also pads, as SigLIP's does, a caption's first end is real.
    """

    def __init__(self, config: TokenizerConfig) -> None:
        """Raises ValueError for a tokenizer that is not on this machine: nothing is downloaded."""
        options, self.config = json.loads(config.options), config
        self._pad_id, self._pads_with_end = 0, False
        if not config.source:
            self._encode = tokenizer(config.context_length, config.vocab_size, **options)
            return
        from open_clip.tokenizer import HFTokenizer  # imports transformers when it is built

        try:
            theirs = HFTokenizer(
                config.source, config.context_length, local_files_only=True, **options
            )
        except (OSError, ValueError, ImportError) as error:
            reason = str(error).strip().splitlines()[0]
            fetch = f"import transformers as t; t.AutoTokenizer.from_pretrained('{config.source}')"
            raise ValueError(
                f"tokenizer {config.source}: found none on this machine ({reason}), expected its "
                f'files in Hugging Face\'s cache; fetch them with: python -c "{fetch}"'
            ) from None
        self._encode = lambda captions: theirs(captions).numpy().astype(np.int32)
        self._pad_id = int(theirs.tokenizer.pad_token_id)
        self._pads_with_end = self._pad_id == theirs.tokenizer.eos_token_id

    def __call__(self, captions: list[str]) -> np.ndarray:
        """Return the tokens of captions."""
        ids = self._encode(captions)
        if self._pad_id == 0:
            return ids
        keep = token_mask(torch.from_numpy(ids != self._pad_id)).numpy()
        if self._pads_with_end:
            keep[:, 1:] |= keep[:, :-1].copy()
            keep[:, 0] = True
        return np.where(keep, ids + 1, 0).astype(np.int32)

    def num_cut(self, captions: list[str]) -> int:
        """Return how many captions have more tokens, start and end included, than are read."""
        room = self.config.context_length
        # one more would do, but for tokenizers that drop the end of text of a caption that fills it
        longer = Tokenizer(replace(self.config, context_length=room + 2))
        tokens = torch.from_numpy(longer(captions))
        return int((token_mask(tokens).sum(1) > room).sum())

    def ids(self, tokens: Tensor) -> Tensor:
        """Return tokens int [...] as the ids of the text tower."""
        return tokens if self._pad_id == 0 else torch.where(tokens == 0, self._pad_id, tokens - 1)
