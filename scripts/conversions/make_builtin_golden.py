"""Makes fixtures/goldens/story: what transformers computes on the built-in model.

usage: make_builtin_golden.py [MODEL_FOLDER [GOLDEN_FOLDER]]
"""

import json
import pathlib
import sys

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

TEXT = "Once upon a time there was a little princess who lived"
NEW_TOKENS = 40
ROOT = pathlib.Path(__file__).parents[2]


def main():
    given = [pathlib.Path(argument) for argument in sys.argv[1:]]
    folder = given[0] if given else ROOT / "crates/bitnet-inference/builtin"
    golden = given[1] if len(given) > 1 else ROOT / "fixtures/goldens/story"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    # Tied heads keep the type of the file whatever `dtype` says; packed codes are no floats.
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_floating_point():
            tensor.data = tensor.data.float()
    model.eval()
    ids = torch.tensor([tokenizer(TEXT, add_special_tokens=False)["input_ids"]])
    with torch.no_grad():
        logits = model(ids).logits.float()
        greedy = ids
        for _ in range(NEW_TOKENS):
            greedy = torch.cat([greedy, model(greedy).logits[:, -1:].argmax(-1)], 1)
    save_file(
        {"input_ids": ids, "logits": logits.contiguous(), "greedy": greedy.contiguous()},
        golden / "golden.safetensors",
    )
    text = {"text": TEXT, "ids": ids[0].tolist(), "greedy_text": tokenizer.decode(greedy[0])}
    (golden / "golden.json").write_text(json.dumps(text, indent=1, ensure_ascii=False) + "\n")
    print(text["greedy_text"])


main()
