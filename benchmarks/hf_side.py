"""The Hugging Face side of ``against_hf.py``: runs under a Python that has transformers."""

import json
import sys
import tempfile
import time
from typing import Any

import torch
from random_pairs import CLIP, LR, ROWS, SHAPE, SMOOTHING, STEPS, WARM, batches, real_tokens
from torch.utils.data import SequentialSampler
from transformers import (
    MarianConfig,
    MarianMTModel,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    TrainerCallback,
)


class Clock(TrainerCallback):
    """Times the steps after the warm-up."""

    began = seconds = 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        del args, control
        if state.global_step == WARM:
            self.began = time.perf_counter()
        if state.global_step == WARM + STEPS:
            self.seconds = time.perf_counter() - self.began


class InOrder(Seq2SeqTrainer):
    """Takes the rows as they come: they are in batches of similar length already."""

    def _get_train_sampler(self, *_: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


def model() -> MarianMTModel:
    layers, heads, hidden = SHAPE["layers"], SHAPE["heads"], SHAPE["hidden"]
    config = MarianConfig(
        vocab_size=SHAPE["vocab"],
        d_model=SHAPE["dim"],
        encoder_layers=layers,
        decoder_layers=layers,
        encoder_attention_heads=heads,
        decoder_attention_heads=heads,
        encoder_ffn_dim=hidden,
        decoder_ffn_dim=hidden,
        activation_function="relu",
        dropout=0.0,
        pad_token_id=0,
        eos_token_id=2,
        decoder_start_token_id=1,
        max_position_embeddings=128,
    )
    return MarianMTModel(config)


def collate(items: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Pad as DataCollatorForSeq2Seq does; label smoothing needs the decoder's input from here."""
    source, labels = _pad(items, "input_ids", 0), _pad(items, "labels", -100)
    before = torch.where(labels == -100, 0, labels).roll(1, dims=1)
    before[:, 0] = 1
    return {
        "input_ids": source,
        "attention_mask": (source != 0).long(),
        "decoder_input_ids": before,
        "labels": labels,
    }


def _pad(items: list[dict[str, list[int]]], name: str, value: int) -> torch.Tensor:
    longest = max(len(item[name]) for item in items)
    return torch.tensor([item[name] + [value] * (longest - len(item[name])) for item in items])


def main(seed: int, threads: int) -> None:
    torch.set_num_threads(threads)
    found = batches(seed)
    arguments = Seq2SeqTrainingArguments(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=ROWS,
        max_steps=WARM + STEPS,
        learning_rate=LR,
        label_smoothing_factor=SMOOTHING,
        max_grad_norm=CLIP,
        optim="adamw_torch_fused",
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    clock = Clock()
    rows = [{"input_ids": s, "labels": t} for batch in found for s, t in batch]
    trainer = InOrder(
        model=model(), args=arguments, train_dataset=rows, data_collator=collate, callbacks=[clock]
    )
    trainer.train()
    parameters = sum(p.numel() for p in trainer.model.parameters())
    speed = real_tokens(found[WARM:]) / clock.seconds
    print(json.dumps({"tokens_per_s": speed, "parameters": parameters}))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
