#!/usr/bin/env python3
"""Random rows of a mapped array, by 8 threads, as a vector search does it; --agent: while a metrics agent reads this
process's smaps_rollup, as many do.

    python3 examples/gather.py --agent
    faultless run -- python3 examples/gather.py --agent

The array (4 GiB) is made on the first run, in the current directory. The ends of every row are checked.
"""
import argparse
import mmap
import os
import subprocess
import threading
import time

import numpy as np

parser = argparse.ArgumentParser()
parser.add_argument("--agent", action="store_true", help="start a process that reads this one's smaps_rollup in a loop")
parser.add_argument("--seconds", type=float, default=5)
parser.add_argument("--file", default="gather.f32")
args = parser.parse_args()

ROWS, COLUMNS, BATCH = 1 << 20, 1024, 64
if not os.path.exists(args.file):
    with open(args.file + ".partial", "wb") as made:
        for start in range(0, ROWS, 1 << 14):
            rows = np.arange(start, start + (1 << 14), dtype=np.float32)
            (rows[:, None] + np.arange(COLUMNS, dtype=np.float32)).tofile(made)
        os.fsync(made.fileno())
    os.rename(args.file + ".partial", args.file)
with open(args.file, "rb") as f:
    os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    mapped = mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ)
mapped.madvise(mmap.MADV_RANDOM)
vectors = np.frombuffer(mapped, dtype=np.float32).reshape(ROWS, COLUMNS)

# What such a service holds besides: its heap.
heap = np.ones(4 << 30, dtype=np.uint8)
counts, stop = [0] * 8, threading.Event()
offsets = np.arange(COLUMNS, dtype=np.float32)


def gather(number):
    random = np.random.default_rng(number + int(time.time()))
    rows = np.empty((BATCH, COLUMNS), dtype=np.float32)
    while not stop.is_set():
        wanted = random.integers(0, ROWS, BATCH)
        np.take(vectors, wanted, axis=0, out=rows, mode="clip")
        assert (rows[:, 0] == wanted).all() and (rows[:, -1] == (wanted + offsets[-1]).astype(np.float32)).all()
        counts[number] += BATCH


agent = None
if args.agent:
    loop = f"while :; do cat /proc/{os.getpid()}/smaps_rollup >/dev/null; done"
    agent = subprocess.Popen(["sh", "-c", loop], start_new_session=True)


def allocate():
    """A service allocates large buffers now and then."""
    while not stop.is_set():
        np.empty(64 << 20, dtype=np.uint8)
        time.sleep(0.001)


threads = [threading.Thread(target=gather, args=(i,)) for i in range(8)] + [threading.Thread(target=allocate)]
for t in threads:
    t.start()
time.sleep(args.seconds)
stop.set()
for t in threads:
    t.join()
if agent:
    os.killpg(agent.pid, 9)
print(f"{sum(counts) / args.seconds:,.0f} rows/s")
