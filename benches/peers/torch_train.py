#!/usr/bin/env python3
"""How fast PyTorch trains the model that `bitnet train` trains: float32, eager, on the CPU.

    pip install torch
    benches/peers/torch_train.py --layers 6 --hidden 256 --ffn 768 --vocab 4096 --window 256 --rows 8 --threads 1

A BitNet with relu squared, sub-norms and a tied head, quantized in training by the straight-through
estimator, on random tokens. Beside it: `bitnet train` with the same shape, whose log has tokens a second.
"""

import argparse
import statistics
import time

import torch
import torch.nn.functional as F
from torch import nn

HEAD = 64
EPS = 1e-5


class BitLinear(nn.Linear):
    """Weights rounded to -1, 0 and 1 by their mean, inputs to 8 bits by their largest; gradients pass."""

    def forward(self, x):
        scale = self.weight.abs().mean().clamp(min=EPS)
        weight = (self.weight / scale).round().clamp(-1, 1) * scale
        step = x.abs().amax(-1, keepdim=True).clamp(min=EPS) / 127
        rounded = (x / step).round().clamp(-128, 127) * step
        return F.linear(x + (rounded - x).detach(), self.weight + (weight - self.weight).detach())


class Norm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS)


class Layer(nn.Module):
    def __init__(self, hidden, ffn):
        super().__init__()
        self.heads = hidden // HEAD
        self.kv_heads = max(1, self.heads // 2)
        kv = self.kv_heads * HEAD
        linear = lambda inputs, outputs: BitLinear(inputs, outputs, bias=False)
        self.before_attention, self.before_ffn = Norm(hidden), Norm(hidden)
        self.before_output, self.before_down = Norm(hidden), Norm(ffn)
        self.q, self.k, self.v, self.o = (
            linear(hidden, hidden), linear(hidden, kv), linear(hidden, kv), linear(hidden, hidden))
        self.gate, self.up, self.down = linear(hidden, ffn), linear(hidden, ffn), linear(ffn, hidden)

    def forward(self, x, rotate):
        rows, tokens, _ = x.shape
        by_head = lambda y, heads: y.view(rows, tokens, heads, HEAD).transpose(1, 2)
        h = self.before_attention(x)
        q = rotate(by_head(self.q(h), self.heads))
        shared = self.heads // self.kv_heads
        k = rotate(by_head(self.k(h), self.kv_heads)).repeat_interleave(shared, 1)
        v = by_head(self.v(h), self.kv_heads).repeat_interleave(shared, 1)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(self.before_output(attended.transpose(1, 2).reshape(rows, tokens, -1)))
        h = self.before_ffn(x)
        return x + self.down(self.before_down(F.relu(self.gate(h)).square() * self.up(h)))


class Model(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.embedding = nn.Embedding(args.vocab, args.hidden)
        self.embedding.weight.data.normal_(0, 0.02)
        self.layers = nn.ModuleList(Layer(args.hidden, args.ffn) for _ in range(args.layers))
        self.norm = Norm(args.hidden)
        frequencies = 10_000 ** -(torch.arange(0, HEAD, 2) / HEAD)
        angles = (torch.arange(args.window)[:, None] * frequencies).repeat(1, 2)
        self.cos, self.sin = angles.cos(), angles.sin()

    def rotate(self, x):
        first, second = x.chunk(2, -1)
        return x * self.cos + torch.cat([-second, first], -1) * self.sin

    def forward(self, tokens):
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x, self.rotate)
        return F.linear(self.norm(x), self.embedding.weight)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in [("layers", 6), ("hidden", 256), ("ffn", 768), ("vocab", 4096), ("window", 256),
                          ("rows", 8), ("threads", 1), ("steps", 12)]:
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(1)
    model = Model(args)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95))
    tokens = torch.randint(0, args.vocab, (args.rows, args.window + 1))
    speeds = []
    for _ in range(args.steps):
        start = time.perf_counter()
        logits = model(tokens[:, :-1])
        loss = F.cross_entropy(logits.reshape(-1, args.vocab), tokens[:, 1:].reshape(-1))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        speeds.append(args.rows * args.window / (time.perf_counter() - start))
    count = sum(parameter.numel() for parameter in model.parameters())
    print(f"{count:,} parameters, torch {torch.__version__}, {args.threads} threads: "
          f"median {statistics.median(speeds):,.0f}, best {max(speeds):,.0f} tokens/s, loss {loss.item():.3f}")


if __name__ == "__main__":
    main()
