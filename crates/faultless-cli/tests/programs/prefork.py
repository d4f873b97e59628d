"""A server that maps its data, and forks four children that read it; threads of the parent do so meanwhile."""
import hashlib
import mmap
import os
import random
import sys
import threading

path = sys.argv[1]
data = mmap.mmap(os.open(path, os.O_RDONLY), 0, mmap.MAP_SHARED, mmap.PROT_READ)
pages = len(data) // 4096


def read(number):
    chosen = random.Random(number)
    digest = hashlib.sha256()
    for _ in range(1500):
        at = chosen.randrange(pages) * 4096
        digest.update(data[at : at + 4096])
    return digest.hexdigest()


results = {}
threads = [threading.Thread(target=lambda n=n: results.update({n: read(n)})) for n in range(2)]
for t in threads:
    t.start()
children = []
for n in range(4):
    ends = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(ends[1], read(n).encode())
        os._exit(0)
    children.append((n, pid, ends[0]))
for n, pid, end in children:
    assert os.waitpid(pid, 0)[1] == 0
    digest = os.read(end, 100).decode()
    results.setdefault(n, digest)
    assert results[n] == digest or n < 2
for t in threads:
    t.join()
print(sorted(results.items()))
