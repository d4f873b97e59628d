"""Reads a mapped file by mmap, numpy.memmap and numpy.load from 8 threads, and writes a slice of it out."""
import hashlib
import mmap
import os
import sys
import threading

import numpy as np

path = sys.argv[1]
array = np.load(path, mmap_mode="r")
plain = np.memmap(path, dtype=np.float32, mode="r", offset=128, shape=array.shape)
rows = array.shape[0]
results = [None] * 8


def work(number):
    random = np.random.default_rng(number)
    digest = hashlib.sha256()
    for _ in range(20):
        wanted = random.integers(0, rows, 300)
        digest.update(array[wanted].tobytes())
        digest.update(plain[wanted[:100]].tobytes())
    results[number] = digest.hexdigest()


threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
for t in threads:
    t.start()
for t in threads:
    t.join()
print(results)
with open(path, "rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as m:
    print(hashlib.sha256(m).hexdigest(), m.find(b"\x93NUMPY"))
    with open(path + ".copy", "wb") as out:
        out.write(memoryview(m)[4096 : 40 << 20])
with open(path + ".copy", "rb") as f:
    print(hashlib.sha256(f.read()).hexdigest())
os.unlink(path + ".copy")
