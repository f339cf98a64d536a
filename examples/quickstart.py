"""fxseek in twenty lines: train one step of a small model on a tenth of its tokens."""

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import fxseek

torch.manual_seed(0)
model = LlamaForCausalLM(
    LlamaConfig(vocab_size=1000, hidden_size=128, intermediate_size=256, num_hidden_layers=4)
)
fxseek.compile(model, ratio=0.1)  # the same object; from here on its training step selects tokens

ids = torch.randint(1000, (2, 256))
batch: dict[str, Any] = {"input_ids": ids, "attention_mask": ids > -1, "labels": ids}
loss = model.train()(**batch).loss
loss.backward()

report = fxseek.report(model)
print(
    f"kept {report.selected.shape[1]} of {report.tokens} tokens; {loss.item():.3f} nats over them"
)
print(f"loss over all tokens: {report.full_loss:.3f}; saved: {report.saved_bytes / 2**20:.1f} MiB")
print(fxseek.explain(model, **batch))
print(fxseek.check_gradients(model, **batch))
