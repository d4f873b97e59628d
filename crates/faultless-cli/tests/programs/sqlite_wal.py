"""Two processes write to a database with a write-ahead log, and map it; each has a thread that reads meanwhile."""
import os
import sqlite3
import subprocess
import sys
import threading

path = sys.argv[1]


def connect():
    connection = sqlite3.connect(path, timeout=100, isolation_level=None, check_same_thread=False)
    connection.execute("pragma mmap_size = 1000000000")
    connection.execute("pragma synchronous = off")
    return connection


def read():
    connection = connect()
    for _ in range(20):
        wrong = connection.execute("select count(*) from t where v != randomish(id)")
        assert wrong.fetchone() == (0,)
    connection.close()


def randomish(i):
    return bytes((i * 7 + j) & 255 for j in range(64)) * 60


def register(connection):
    connection.create_function("randomish", 1, randomish, deterministic=True)
    return connection


if len(sys.argv) == 2:
    children = [subprocess.Popen([sys.executable, __file__, path, str(i)]) for i in (1, 2)]
    assert all(c.wait() == 0 for c in children)
    connection = register(connect())
    print(connection.execute("pragma integrity_check").fetchone())
    print(connection.execute("select count(*) from t where v != randomish(id)").fetchone())
    print(connection.execute("select count(*) from t").fetchone())
else:
    plain_connect = connect
    connect = lambda: register(plain_connect())
    reader = threading.Thread(target=read)
    reader.start()
    connection = connect()
    for i in range(150):
        connection.execute("begin immediate")
        last = connection.execute("select max(id) from t").fetchone()[0]
        connection.execute("insert into t values (?, ?)", (last + 1, randomish(last + 1)))
        connection.execute("commit")
    connection.close()
    reader.join()
