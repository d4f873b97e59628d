"""Eight threads read a database through its mapping."""
import hashlib
import random
import sqlite3
import sys
import threading

path, rows = sys.argv[1], int(sys.argv[2])
results = [None] * 8


def work(number):
    connection = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
    connection.execute("pragma mmap_size = 4000000000")
    chosen = random.Random(number)
    digest = hashlib.sha256()
    for _ in range(1500):
        key = chosen.randrange(rows)
        digest.update(connection.execute("select v from t where id = ?", (key,)).fetchone()[0])
    results[number] = digest.hexdigest()
    connection.close()


threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
for t in threads:
    t.start()
for t in threads:
    t.join()
print(results)
