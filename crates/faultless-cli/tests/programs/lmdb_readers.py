"""Eight threads read an LMDB environment without its lock file."""
import hashlib
import random
import sys
import threading

import lmdb

path, rows = sys.argv[1], int(sys.argv[2])
environment = lmdb.open(path, readonly=True, lock=False)
results = [None] * 8


def work(number):
    chosen = random.Random(number)
    digest = hashlib.sha256()
    with environment.begin(buffers=True) as transaction:
        for _ in range(2000):
            digest.update(transaction.get(b"%08d" % chosen.randrange(rows)))
    results[number] = digest.hexdigest()


threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
for t in threads:
    t.start()
for t in threads:
    t.join()
print(results)
