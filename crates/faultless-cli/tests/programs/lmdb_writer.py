"""Makes an LMDB environment, and reads back what it writes."""
import hashlib
import sys

import lmdb

path, rows = sys.argv[1], int(sys.argv[2])
environment = lmdb.open(path, map_size=2 << 30, sync=False)
for start in range(0, rows, 10000):
    with environment.begin(write=True) as transaction:
        for i in range(start, min(start + 10000, rows)):
            transaction.put(b"%08d" % i, hashlib.sha256(b"%d" % i).digest() * 20)
    with environment.begin(buffers=True) as transaction:
        for i in range(start, min(start + 10000, rows), 97):
            assert transaction.get(b"%08d" % i) == hashlib.sha256(b"%d" % i).digest() * 20
environment.sync(True)
environment.close()
print("good")
