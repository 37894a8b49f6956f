"""Gradients of llama-ternary-tiny on the other side of a rounding, by the reference implementation.

One activation of this model stands on the border between two codes. A change of the embedding by 1e-7 of
its size moves it across; the gradients that this moves by more than a thousandth are written beside the others.
Needs torch and transformers. Usage: make_flipped_gradients.py fixtures/goldens/llama-ternary-tiny
"""
import sys

import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

torch.set_num_threads(1)
folder = sys.argv[1]
ids = load_file(f"{folder}/golden.safetensors")["input_ids"]
golden = load_file(f"{folder}/gradients.safetensors")
model = LlamaForCausalLM.from_pretrained(f"{folder}/online", dtype=torch.float32).train()
torch.manual_seed(1)
table = model.model.embed_tokens.weight
table.data *= 1 + 1e-7 * torch.randn_like(table)
model(ids, labels=ids).loss.backward()
flipped = {}
for name, parameter in model.named_parameters():
    want = golden[f"grad.{name}"]
    distance = ((parameter.grad - want).norm() / want.norm()).item()
    if distance > 9e-4:
        print(f"{name}: {distance:.2e}")
        flipped[f"grad.{name}"] = parameter.grad.contiguous()
save_file(flipped, f"{folder}/flipped.safetensors")
