"""Two processes read and write an LMDB environment, with its locks; each has threads that read meanwhile."""
import hashlib
import random
import subprocess
import sys
import threading

import lmdb

path, rows = sys.argv[1], int(sys.argv[2])


def value(i):
    return hashlib.sha256(b"%d" % i).digest() * 20


def read(environment, number):
    chosen = random.Random(number)
    for _ in range(20):
        with environment.begin(buffers=True) as transaction:
            for _ in range(100):
                i = chosen.randrange(rows)
                assert transaction.get(b"%08d" % i) == value(i)


if len(sys.argv) == 3:
    children = [subprocess.Popen([sys.executable, __file__, path, str(rows), str(i)]) for i in (1, 2)]
    assert all(c.wait() == 0 for c in children)
    environment = lmdb.open(path, map_size=2 << 30)
    with environment.begin() as transaction:
        print(transaction.stat()["entries"])
        print(all(transaction.get(b"more%06d%d" % (i, n)) == value(i) for i in range(300) for n in (1, 2)))
else:
    environment = lmdb.open(path, map_size=2 << 30, sync=False)
    number = int(sys.argv[3])
    threads = [threading.Thread(target=read, args=(environment, number * 10 + t)) for t in range(3)]
    for t in threads:
        t.start()
    for i in range(300):
        with environment.begin(write=True) as transaction:
            transaction.put(b"more%06d%d" % (i, number), value(i))
    for t in threads:
        t.join()
    environment.close()
