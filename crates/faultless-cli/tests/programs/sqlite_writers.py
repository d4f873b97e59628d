"""Two processes write to a database by turns, through its locks."""
import os
import sqlite3
import subprocess
import sys

path = sys.argv[1]
if len(sys.argv) == 2:
    connection = sqlite3.connect(path)
    connection.execute("create table t (id integer primary key, who integer, v blob)")
    connection.execute("create table n (count integer)")
    connection.execute("insert into n values (0)")
    connection.executemany("insert into t (who, v) values (0, ?)", ((os.urandom(4000),) for _ in range(2000)))
    connection.commit()
    connection.close()
    children = [subprocess.Popen([sys.executable, __file__, path, str(i)]) for i in (1, 2)]
    assert all(c.wait() == 0 for c in children)
    connection = sqlite3.connect(path)
    connection.execute("pragma mmap_size = 1000000000")
    print(connection.execute("pragma integrity_check").fetchone())
    print(connection.execute("select count(*) from t").fetchone(), connection.execute("select count from n").fetchone())
else:
    connection = sqlite3.connect(path, timeout=100, isolation_level=None)
    connection.execute("pragma mmap_size = 1000000000")
    connection.execute("pragma synchronous = off")
    for _ in range(150):
        connection.execute("begin immediate")
        # Lost if a lock is: both would read the same count.
        count = connection.execute("select count from n").fetchone()[0]
        connection.execute("insert into t (who, v) values (?, ?)", (int(sys.argv[2]), os.urandom(4000)))
        connection.execute("update n set count = ?", (count + 1,))
        connection.execute("commit")
    connection.close()
