"""Makes fixtures/goldens/qwen3-tiny: a small random Qwen3 model with ternary projections and linear
rope scaling, packed by transformers, and the logits and greedy tokens transformers computes.

usage: make_qwen3_golden.py FOLDER        (needs torch, transformers, accelerate, safetensors)
"""

import json
import os
import sys
import tempfile

import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3Config, Qwen3ForCausalLM
from transformers.integrations.bitnet import pack_weights

QUANTIZATION = {
    "quant_method": "bitnet",
    "linear_class": "autobitlinear",
    "quantization_mode": "offline",
    "modules_to_not_convert": ["lm_head"],
}


def random_model():
    torch.manual_seed(7)
    config = Qwen3Config(
        vocab_size=192,
        hidden_size=96,
        intermediate_size=224,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,  # not hidden_size / heads, as in the larger models of this family
        max_position_embeddings=512,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 1000000.0},
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=None,
    )
    model = Qwen3ForCausalLM(config).float()
    for name, weights in model.named_parameters():
        if "norm" in name:
            weights.data.uniform_(0.5, 1.5)
        else:
            weights.data.normal_(0, 0.05 if "_proj" in name else 0.5)
    return model


def pack(model, folder):
    with tempfile.TemporaryDirectory() as masters:
        model.save_pretrained(masters)
        config = json.load(open(os.path.join(masters, "config.json")))
        tensors = load_file(os.path.join(masters, "model.safetensors"))
    packed = {}
    for name, weights in tensors.items():
        if not name.endswith("_proj.weight"):
            packed[name] = weights
            continue
        scale = weights.abs().mean().clamp(min=1e-5)
        packed[name] = pack_weights((weights / scale).round().clamp(-1, 1))
        packed[name.removesuffix("weight") + "weight_scale"] = scale.reshape(1)
    os.makedirs(folder, exist_ok=True)
    save_file(packed, os.path.join(folder, "model.safetensors"), metadata={"format": "pt"})
    with open(os.path.join(folder, "config.json"), "w") as file:
        json.dump(config | {"quantization_config": QUANTIZATION}, file, indent=1)


def main():
    folder = sys.argv[1]
    packed = os.path.join(folder, "packed_multiply")
    pack(random_model(), packed)
    model = Qwen3ForCausalLM.from_pretrained(packed, dtype=torch.float32).eval()
    ids = torch.randint(3, 192, (2, 24))
    with torch.no_grad():
        result = {"input_ids": ids, "logits.packed_multiply": model(ids).logits}
        greedy = ids[:1, :12]
        for _ in range(24):
            best = model(greedy).logits[:, -1].argmax(-1, keepdim=True)
            greedy = torch.cat([greedy, best], 1)
    result["greedy"] = greedy
    result = {name: tensor.contiguous() for name, tensor in result.items()}
    save_file(result, os.path.join(folder, "golden.safetensors"))


main()
