"""Measures llama.cpp the way `bitnet bench` measures us: the same tests, steps and JSON.

Runs inside the environment that compare.py makes. Each test is run once unmeasured, then `-r` times;
made-up tokens, no sampling; logits of a prompt's last token and of every generated one.
"""

import argparse
import ctypes
import json
import time

import llama_cpp as lib


def numbers(text):
    return [int(part) for part in text.split(",") if int(part) > 0]


def arguments():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("-t", "--threads", type=int, required=True)
    parser.add_argument("-p", "--prompt", type=numbers, default=[128, 512])
    parser.add_argument("-n", "--generate", type=numbers, default=[128])
    parser.add_argument("-d", "--depth", type=int, default=0)
    parser.add_argument("-b", "--batch", type=numbers, default=[1])
    parser.add_argument("-r", "--repetitions", type=int, default=5)
    parser.add_argument("--quantize-head", metavar="OUT", help="write a copy with a Q6_K head and end")
    return parser.parse_args()


class Peer:
    """A model and a context for a number of sequences of a length."""

    def __init__(self, model, threads, sequences, positions):
        self.model = model
        params = lib.llama_context_default_params()
        # The cache is divided among the sequences, in units of 256 positions.
        params.n_ctx = sequences * (-(-positions // 256) * 256)
        params.n_batch = 2048
        params.n_ubatch = 512
        params.n_seq_max = sequences
        params.n_threads = threads
        params.n_threads_batch = threads
        self.context = lib.llama_init_from_model(model, params)
        if not self.context:
            raise SystemExit("llama.cpp made no context")
        self.batch = lib.llama_batch_init(2048, 0, 1)
        self.n_vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))

    def close(self):
        lib.llama_batch_free(self.batch)
        lib.llama_free(self.context)

    def clear(self):
        lib.llama_memory_clear(lib.llama_get_memory(self.context), True)

    def forget(self, depth):
        """Drops everything from position `depth` on."""
        memory = lib.llama_get_memory(self.context)
        if not lib.llama_memory_seq_rm(memory, -1, depth, -1):
            raise SystemExit("llama.cpp cannot go back in its cache")

    def decode(self, rows):
        """One call for rows of (sequence, position, wants logits); seconds."""
        batch = self.batch
        batch.n_tokens = len(rows)
        for i, (sequence, position, logits) in enumerate(rows):
            batch.token[i] = (position * 7919 + sequence * 104729 + 1) % self.n_vocab
            batch.pos[i] = position
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = sequence
            batch.logits[i] = logits
        start = time.perf_counter()
        if lib.llama_decode(self.context, batch) != 0:
            raise SystemExit("llama_decode failed")
        lib.llama_synchronize(self.context)
        return time.perf_counter() - start

    def prompt(self, sequence, first, count):
        seconds = 0.0
        for at in range(first, first + count, 512):
            end = min(at + 512, first + count)
            rows = [(sequence, p, p == first + count - 1) for p in range(at, end)]
            seconds += self.decode(rows)
        return seconds

    def generate(self, sequences, first, count):
        step = lambda position: self.decode([(s, position, True) for s in range(sequences)])
        return sum(step(position) for position in range(first, first + count))


def measure(model, args, name, sequences, n_tokens, run):
    """Repetitions of `run(peer)`, which computes n_tokens tokens behind the depth."""
    peer = Peer(model, args.threads, sequences, args.depth + n_tokens // sequences)
    for sequence in range(sequences if args.depth else 0):
        peer.prompt(sequence, 0, args.depth)
    samples = []
    for repetition in range(args.repetitions + 1):
        seconds = run(peer)
        if repetition:
            samples.append(n_tokens / seconds)
        peer.forget(args.depth) if args.depth else peer.clear()
    peer.close()
    name += f" x{sequences}" if sequences > 1 else ""
    name += f" @ d{args.depth}" if args.depth else ""
    rate = sum(samples) / len(samples)
    return {"test": name, "threads": args.threads, "tok_per_s": rate, "samples": samples}


def main():
    args = arguments()
    silent = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)
    lib.llama_log_set(silent, None)
    lib.llama_backend_init()
    if args.quantize_head:
        params = lib.llama_model_quantize_default_params()
        params.ftype = lib.LLAMA_FTYPE_MOSTLY_TQ2_0
        params.token_embedding_type = lib.GGML_TYPE_Q6_K
        params.allow_requantize = True
        source, target = args.model.encode(), args.quantize_head.encode()
        if lib.llama_model_quantize(source, target, ctypes.byref(params)) != 0:
            raise SystemExit("llama.cpp could not quantize the head")
        return
    start = time.perf_counter()
    model = lib.llama_model_load_from_file(args.model.encode(), lib.llama_model_default_params())
    if not model:
        raise SystemExit(f"llama.cpp did not open {args.model}")
    load = time.perf_counter() - start
    results = []
    for count in args.prompt:
        run = lambda peer, n=count: peer.prompt(0, args.depth, n)
        results.append(measure(model, args, f"pp{count}", 1, count, run))
    for count in args.generate:
        for sequences in args.batch:
            run = lambda peer, s=sequences, n=count: peer.generate(s, args.depth, n)
            results.append(measure(model, args, f"tg{count}", sequences, count * sequences, run))
    system = lib.llama_print_system_info().decode()
    version = getattr(lib, "__version__", "")
    print(json.dumps({"results": results, "load_s": load, "version": version, "system": system}))


main()
