#!/usr/bin/env python3
"""Sends `bitnet serve` many requests, most of them broken off, and looks at what is left in the process.

    scripts/soak.py BITNET [REQUESTS]      BITNET is the built program; 10,000 requests by default

Prints resident memory, threads and open files on the way, and fails if memory grows by more than a
twentieth after the first fifth, if a thread or a file handle is left at the end, if any request meets
a 5xx or an unexpected end, or if memory exceeds its bounds: 50 MB without a model, 60 MB with the
built-in one. The KV cache takes its memory as it fills and keeps it for prefixes that come again, so it
has a small budget here. Linux only; nothing but Python's own library.
"""

import http.client
import json
import pathlib
import random
import re
import subprocess
import sys
import threading
import time

THREADS = 16


def resources(pid):
    status = pathlib.Path(f"/proc/{pid}/status").read_text()
    number = lambda name: int(re.search(rf"^{name}:\s+(\d+)", status, re.M)[1])
    files = len(list(pathlib.Path(f"/proc/{pid}/fd").iterdir()))
    return number("VmRSS") * 1024 / 1e6, number("Threads"), files


def body(seed, **extra):
    return {"model": "builtin", "seed": seed, **extra}


def one(address, seed):
    """One request; what was wrong with the answer, or None."""
    chance = random.Random(seed)
    connection = http.client.HTTPConnection(*address, timeout=120)
    prompt = " ".join(chance.choice(["once", "upon", "a", "time", "king", "sea"]) for _ in range(chance.randrange(1, 60)))
    kind = chance.choice(["whole", "stream", "left", "left", "unread", "refused"])
    path, data = "/v1/completions", body(seed, prompt=prompt, max_tokens=chance.randrange(1, 40), stream=kind in ("stream", "left"))
    if kind == "left":
        data.update(max_tokens=400, ignore_eos=True, n=chance.randrange(1, 4))
    if kind == "refused":
        data["temperature"] = -1
    if chance.random() < 0.3:
        path = "/v1/chat/completions"
        data["messages"] = [{"role": "user", "content": data.pop("prompt")}]
    try:
        connection.request("POST", path, json.dumps(data), {"content-type": "application/json"})
        if kind == "unread":
            time.sleep(chance.random() * 0.02)
            return None
        response = connection.getresponse()
        if kind == "left":
            response.read(chance.randrange(1, 2000))
            return None if response.status == 200 else f"left: {response.status}"
        text = response.read()
        expected = 400 if kind == "refused" else 200
        if response.status != expected:
            return f"{kind}: {response.status} {text[:200]}"
        if kind == "stream" and not text.endswith(b"data: [DONE]\n\n"):
            return f"stream ended with {text[-100:]}"
    finally:
        connection.close()
    return None


def main():
    program = sys.argv[1]
    total = int(sys.argv[2]) if len(sys.argv) > 2 else 10_000
    server = subprocess.Popen([program, "serve", "--port", "0", "--log-format", "json", "--log", "warn,bitnet=info", "--kv-memory", "24"], stderr=subprocess.PIPE, text=True)
    address, failures = None, []
    for line in server.stderr:
        found = re.search(r"listening on http://([\d.]+):(\d+)", line)
        if found:
            address = (found[1], int(found[2]))
            break
    threading.Thread(target=lambda: [None for _ in server.stderr], daemon=True).start()
    try:
        connection = http.client.HTTPConnection(*address)
        connection.request("GET", "/health")
        connection.getresponse().read()
        connection.close()
        empty = resources(server.pid)[0]
        print(f"no model: {empty:.1f} MB")
        if empty >= 50:
            failures.append("50 MB or more without a model")
        failures += filter(None, [one(address, seed) for seed in range(8)])
        with_model = resources(server.pid)[0]
        print(f"built-in model: {with_model:.1f} MB")
        if with_model >= 60:
            failures.append("60 MB or more with the built-in model")

        samples, lock, progress = [], threading.Lock(), iter(range(total))

        def work():
            while True:
                with lock:
                    i = next(progress, None)
                    if i is None:
                        return
                    if i % max(1, total // 20) == 0:
                        samples.append(resources(server.pid))
                        print("%6d requests: %.1f MB, %d threads, %d files" % (i, *samples[-1]), flush=True)
                try:
                    wrong = one(address, 1000 + i)
                except OSError as error:
                    wrong = f"{type(error).__name__}: {error}"
                if wrong:
                    failures.append(wrong)

        start = time.monotonic()
        workers = [threading.Thread(target=work) for _ in range(THREADS)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        took = time.monotonic() - start
        time.sleep(12)  # threads for blocking work end after ten idle seconds
        end = resources(server.pid)
        print("%6d requests in %.0f s: %.1f MB, %d threads, %d files" % (total, took, *end))
        settled = samples[len(samples) // 5 :] + [end]
        low, high = min(s[0] for s in settled), max(s[0] for s in settled)
        print(f"memory after the first fifth: {low:.1f} to {high:.1f} MB, ±{(high - low) / (high + low) * 100:.1f} %")
        if (high - low) / (high + low) > 0.05:
            failures.append("memory is not flat")
        if end[1] > samples[0][1]:
            failures.append(f"{end[1] - samples[0][1]} threads are left")
        # The first sample is taken while a request may be open.
        if end[2] > min(s[2] for s in samples):
            failures.append("file handles are left")
        connection = http.client.HTTPConnection(*address)
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
        for name in ("bitnet_requests_in_flight", 'bitnet_sequences_running{model_name="builtin"}', 'bitnet_kv_cache_usage_ratio{model_name="builtin"}'):
            if f"{name} 0\n" not in text:
                failures.append(f"{name} is not 0")
    finally:
        server.terminate()
        code = server.wait(60)
    if code != 0:
        failures.append(f"the server ended with {code}")
    for failure in failures[:20]:
        print("FAILED:", failure)
    sys.exit(bool(failures))


main()
