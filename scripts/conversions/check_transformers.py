"""Loads the folders that `bitnet convert` and `bitnet quantize` wrote with transformers, and compares
its logits with those of `bitnet logits`.

usage: check_transformers.py BITNET FOLDER...
"""

import json
import subprocess
import sys

import numpy
import torch
from transformers import AutoModelForCausalLM

IDS = [1, 5, 9, 200, 33, 7, 7, 64, 110, 17, 2, 91]


def logits_of_transformers(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    # Tied heads keep the type of the file whatever `dtype` says; packed codes are no floats.
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_floating_point():
            tensor.data = tensor.data.float()
    model.eval()
    with torch.no_grad():
        return model(torch.tensor([IDS])).logits[0].float().numpy()


def logits_of_bitnet(bitnet, model):
    ids = ",".join(map(str, IDS))
    command = [bitnet, "logits", model, "--ids", ids, "--all", "--json"]
    output = subprocess.run(command, check=True, capture_output=True).stdout
    return numpy.array(json.loads(output)["logits"])


def main():
    bitnet, *folders = sys.argv[1:]
    worst = 0.0
    for folder in folders:
        theirs, ours = logits_of_transformers(folder), logits_of_bitnet(bitnet, folder)
        assert theirs.shape == ours.shape, (folder, theirs.shape, ours.shape)
        distance = numpy.linalg.norm(theirs - ours) / numpy.linalg.norm(theirs)
        print(f"{folder}: relative distance {distance:.1e}")
        worst = max(worst, distance)
    # Packed folders carry bfloat16 scales and norms on one side at most; nothing else may differ.
    assert worst < 1e-3, worst


main()
