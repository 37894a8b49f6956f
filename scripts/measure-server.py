#!/usr/bin/env python3
"""What serving a model costs beside computing it, and what sharing a machine gains.

    scripts/measure-server.py BITNET MODEL.gguf [THREADS]

    bitnet bench --synthetic 2b4t --write-gguf 2b4t.gguf    makes a file to measure with

Prints, each from the server's own clock or a client on this machine: the tokens a second of one stream
and of sixteen, from the server and from the bare engine in turns; the processor time of the server's own
threads; the time to the first token of a prompt of 1,000 tokens, new and a second time with the same
beginning; how soon nothing is computed any more for a client that left. Run it on a machine that does
nothing else. Linux only; nothing but Python's own library.
"""

import http.client
import json
import math
import pathlib
import random
import re
import statistics
import subprocess
import sys
import threading
import time

TOKENS = 48
COMPUTING = re.compile(r"^bitnet-(worker|\d+)$")


class Server:
    def __init__(self, program, model, threads):
        command = [program, "serve", "-m", f"m={model}", "--preload", "--port", "0", "--threads", threads, "--log-format", "json"]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        for line in self.process.stderr:
            if found := re.search(r"listening on http://([\d.]+):(\d+)", line):
                self.address = found[1], int(found[2])
                break
        threading.Thread(target=self.process.stderr.read, daemon=True).start()

    def metric(self, name):
        connection = http.client.HTTPConnection(*self.address)
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
        return float(re.search(rf'^{name}(?:{{[^}}]*}})? (\S+)$', text, re.M)[1])

    def own_seconds(self):
        """Processor time of all threads but those that compute."""
        total = 0
        for task in pathlib.Path(f"/proc/{self.process.pid}/task").iterdir():
            if not COMPUTING.match((task / "comm").read_text().strip()):
                total += int((task / "schedstat").read_text().split()[0])
        return total / 1e9


class Stream:
    """A streamed completion: when how many tokens had come."""

    def __init__(self, server, prompt, n_tokens):
        self.events = []
        self.connection = http.client.HTTPConnection(*server.address, timeout=600)
        body = {"model": "m", "prompt": prompt, "max_tokens": n_tokens, "temperature": 0, "ignore_eos": True, "stream": True,
                "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
        self.start = time.monotonic()
        self.connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
        self.response = self.connection.getresponse()
        assert self.response.status == 200, self.response.read()

    def read(self, most=10**9):
        while self.counted() < most and (line := self.response.readline()):
            if line.startswith(b"data: {"):
                n_tokens = json.loads(line[6:])["usage"]["completion_tokens"]
                if n_tokens > self.counted():
                    self.events.append((time.monotonic(), n_tokens))
        return self

    def counted(self, until=math.inf):
        return max((n for at, n in self.events if at <= until), default=0)

    def first(self):
        return self.events[0][0]


def prompt(chance, n):
    return [chance.randrange(256, 4096) for _ in range(n)]


def served(server, chance, n_streams):
    """Tokens a second after the prompts, all streams together, and the processor time that the server's
    own threads and this client took for a token."""
    streams = [None] * n_streams

    def one(i):
        streams[i] = Stream(server, prompts[i], TOKENS).read()

    prompts = [prompt(chance, 4) for _ in range(n_streams)]
    own, client = server.own_seconds(), time.process_time()
    threads = [threading.Thread(target=one, args=(i,)) for i in range(n_streams)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    own = (server.own_seconds() - own) / (n_streams * TOKENS)
    client = (time.process_time() - client) / (n_streams * TOKENS)
    # From when every stream has its first token to when the first of them ends.
    begin, end = max(s.first() for s in streams), min(s.events[-1][0] for s in streams)
    n_tokens = sum(s.counted(end) - s.counted(begin) for s in streams)
    assert all(s.counted() == TOKENS for s in streams)
    return n_tokens / (end - begin), own, client


def engine(program, model, threads, n_streams):
    """The bare engine's tokens a second, the most this machine allows, and what allows no more."""
    command = [program, "bench", "-m", model, "-p", "0", "-n", str(TOKENS), "-b", str(n_streams), "-r", "1", "-t", threads, "--logits", "1", "--json"]
    report = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    result = report["results"][0]
    return result["tok_per_s"], result["limit_tok_per_s"], result["limited_by"]


def streams(server, program, model, threads, chance, rounds):
    rates = {}
    for n_streams in (1, 16):
        pairs = [(engine(program, model, threads, n_streams), served(server, chance, n_streams)) for _ in range(rounds)]
        bare = [rate for (rate, _, _), _ in pairs]
        ours = [rate for _, (rate, _, _) in pairs]
        limit, limited_by = statistics.median(limit for (_, limit, _), _ in pairs), pairs[0][0][2]
        own, client = (statistics.median(measured[i] for _, measured in pairs) for i in (1, 2))
        rate = rates[n_streams] = statistics.median(ours)
        show = lambda values: ", ".join(f"{value:.1f}" for value in values)
        print(f"{n_streams:2} streams: engine {show(bare)} tokens/s, server {show(ours)}; {rate / limit:.0%} of the {limit:.0f} that {limited_by} allows")
        print(f"            the server's own threads: {own * 1e6:.0f} µs a token, {own * rate:.2%} of one processor; this client {client * rate:.2%}", flush=True)
    print(f"16 streams give {rates[16] / rates[1]:.2f} times one stream")


def shared_prefix(server, chance, rounds):
    for _ in range(rounds):
        shared = prompt(chance, 1000)
        first, second = (Stream(server, shared + prompt(chance, 8), 2).read() for _ in range(2))
        first, second = (stream.first() - stream.start for stream in (first, second))
        print(f"first token behind 1,000 tokens: {first:.3f} s, with the same beginning again {second:.3f} s, {second / first:.1%}", flush=True)


def is_busy(server):
    return server.metric("bitnet_sequences_running") + server.metric("bitnet_sequences_waiting") > 0


def leaving(server, chance, rounds):
    """Milliseconds from a client's leaving to the engine having nothing to do."""
    for what, n_prompt, n_read in [("between tokens", 8, 4), ("in a prompt of 3,000 tokens", 3000, 0)]:
        times = []
        for _ in range(rounds):
            stream = Stream(server, prompt(chance, n_prompt), 1000).read(n_read)
            if n_read == 0:
                time.sleep(0.3)
            assert is_busy(server)
            start = time.monotonic()
            stream.response.close()
            stream.connection.close()
            while is_busy(server):
                time.sleep(0.001)
            times.append(time.monotonic() - start)
        print(f"a client leaves {what}: free after {', '.join(f'{at * 1e3:.0f}' for at in times)} ms", flush=True)


def main():
    program, model = sys.argv[1:3]
    threads = sys.argv[3] if len(sys.argv) > 3 else "2"
    server = Server(program, model, threads)
    try:
        chance = random.Random(1)
        served(server, chance, 1)  # Memory is touched for the first time.
        streams(server, program, model, threads, chance, 2)
        shared_prefix(server, chance, 2)
        leaving(server, chance, 3)
    finally:
        server.process.terminate()
        server.process.wait(60)


main()
