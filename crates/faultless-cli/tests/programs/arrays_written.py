"""Writes to a mapped array by numpy.memmap: into the file (r+), and into copies of its pages (c)."""
import hashlib
import os
import sys
import threading

import numpy as np

path = sys.argv[1]
rows = os.path.getsize(path) // 4096


def digest(array):
    return hashlib.sha256(np.ascontiguousarray(array)).hexdigest()


def cool():
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


def work(array, number):
    # Every eighth row: some are read first, and some are written first.
    for row in range(number, rows, 8):
        if row % 3 == 0:
            array[row, 7] = array[row, 5] ^ 0x5A
        elif row % 3 == 1:
            array[row, 4000:] = row % 251


for mode in ["c", "r+"]:
    before = np.fromfile(path, dtype=np.uint8).reshape(rows, 4096)
    cool()
    array = np.memmap(path, dtype=np.uint8, mode=mode, shape=(rows, 4096))
    threads = [threading.Thread(target=work, args=(array, i)) for i in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for i in range(8):
        work(before, i)
    # A file is read into it.
    with open(path, "rb") as f:
        f.seek(1 << 20)
        assert f.readinto(memoryview(array[rows // 2 : rows // 2 + 64].reshape(-1))) == 64 * 4096
    before[rows // 2 : rows // 2 + 64] = array[rows // 2 : rows // 2 + 64]
    print(mode, digest(array) == digest(before))
    array.flush()
    print(digest(np.fromfile(path, dtype=np.uint8)))
    del array
