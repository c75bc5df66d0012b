"""The demo's model and text in small: a random BERT, and sentences whose words decide the label."""

from __future__ import annotations

import random

import torch

from loraxs_kernels.demo.data import Snippet
from loraxs_kernels.demo.model import Base, SnippetClassifier

GOOD = ["splendid", "moving", "funny", "warm"]
BAD = ["dull", "clumsy", "hollow", "shrill"]
FILLER = ["the", "film", "is", "a", "story", "of", "and", "with"]
WORDS = {word: number for number, word in enumerate(["[pad]", *GOOD, *BAD, *FILLER])}


def synthetic_snippets(n: int) -> list[Snippet]:
    rng = random.Random(7)
    snippets = []
    for i in range(n):
        words = rng.choices(FILLER, k=rng.randint(3, 9)) + rng.choices(GOOD if i % 2 else BAD, k=3)
        rng.shuffle(words)
        # The number in front makes every text different; the tokenizer below ignores it.
        snippets.append(Snippet(i, 2.0 if i % 2 else -2.0, f"{i} " + " ".join(words)))
    return snippets


def tiny_base() -> Base:
    """A random two-layer BERT of width 32: always the same encoder, as if it were pretrained."""
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
        initializer_range=0.2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )

    def build(seed: int) -> SnippetClassifier:
        with torch.random.fork_rng():
            torch.manual_seed(99)
            return SnippetClassifier(BertModel(config, add_pooling_layer=False), 32, seed)

    def encode(texts):
        return [[WORDS[word] for word in text.split() if word in WORDS] for text in texts]

    return Base("tiny", build, encode, pad_id=0)
