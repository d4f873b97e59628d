//! Programs of the distribution under `faultless run`: servers with their clients, compilers, interpreters, debuggers. Each script
//! runs by itself and served, with all that it starts, and must print the same and end the same.

mod common;

use common::*;
use std::path::PathBuf;
use std::process::{Command, Output};

/// A directory for one script, on a disk file system, empty.
fn place(name: &str) -> PathBuf {
    let dir = scratch().join("smoke").join(name);
    let _ = std::fs::remove_dir_all(&dir);
    std::fs::create_dir_all(&dir).expect("a directory");
    dir
}

/// What all scripts begin with.
const PRELUDE: &str = r##"
set -u
until_there() { for i in $(seq 600); do [ -e "$1" ] && return; sleep .05; done; echo "$1 did not come"; exit 3; }
until_open() { for i in $(seq 600); do (exec 3<>/dev/tcp/127.0.0.1/$1) 2>/dev/null && return; sleep .05; done; echo "port $1 did not open"; exit 3; }
"##;

/// Runs a script by itself or with options of `faultless run`.
fn run(name: &str, script: &str, options: Option<&[&str]>) -> (Output, PathBuf) {
    let dir = place(name);
    let json = dir.with_extension("json");
    let mut command = Command::new("timeout");
    command.args(["--signal=KILL", "240"]);
    if let Some(options) = options {
        command
            .arg(FAULTLESS)
            .args(["run", "--stats-json"])
            .arg(&json)
            .args(options);
        command.arg("--").env("FAULTLESS_LIBRARY", library());
    }
    command
        .args(["/bin/bash", "-c"])
        .arg(format!("{PRELUDE}{script}"));
    // A port of its own for each run: sockets of the one before may linger.
    static PORT: std::sync::atomic::AtomicU16 = std::sync::atomic::AtomicU16::new(23_000);
    let port = PORT.fetch_add(2, std::sync::atomic::Ordering::Relaxed);
    command
        .current_dir(&dir)
        .env("PORT", port.to_string())
        .env("PORT2", (port + 1).to_string());
    (command.output().expect("it starts"), json)
}

/// As users run it, and with all taken over that can be.
const BOTH: [&[&str]; 2] = [
    &["--memory", "64M"],
    &["--memory", "64M", "--eager", "--min-size", "64K"],
];

#[track_caller]
fn smoke(name: &str, needs: &[&str], script: &str) {
    let mut ways = BOTH.to_vec();
    if faultless::live::support().is_ok() {
        ways.push(&LIVE);
    }
    smoke_with(&ways, name, needs, script);
}

/// All that can be, live.
const LIVE: [&str; 5] = ["--backend", "live", "--eager", "--min-size", "64K"];

/// Runs a script by itself and with each of some options.
#[track_caller]
fn smoke_with(ways: &[&[&str]], name: &str, needs: &[&str], script: &str) {
    if !possible(name, commands(needs)) {
        return;
    }
    let (alone, _) = run(name, script, None);
    let out = |o: &Output| String::from_utf8_lossy(&o.stdout).into_owned();
    assert!(
        alone.status.success(),
        "{name} by itself: {}: {}{}",
        alone.status,
        out(&alone),
        String::from_utf8_lossy(&alone.stderr)
    );
    for &options in ways {
        let (served, json) = run(name, script, Some(options));
        assert!(
            out(&served) == out(&alone) && served.status == alone.status,
            "{name} {options:?}: {}\n{}\nby itself: {}\n{}\n{}",
            served.status,
            out(&served),
            alone.status,
            out(&alone),
            String::from_utf8_lossy(&served.stderr)
        );
        let taken: u64 = faultless_run::read_reports(&json)
            .map_or(0, |all| all.iter().map(|r| r.totals.mappings).sum());
        eprintln!("{name} {options:?}: {taken} mappings taken over");
    }
}

#[test]
fn redis() {
    smoke(
        "redis",
        &["redis-server", "redis-cli", "redis-benchmark"],
        r##"
redis-server --port 0 --unixsocket $PWD/s --dir $PWD --save '' >log 2>&1 & until_there s
redis-cli -s s set a 1; redis-cli -s s get a
redis-benchmark -s s -n 2000 -q -t set,get 2>&1 | tr '\r' '\n' | grep 'per second' | cut -d: -f1
redis-cli -s s save; redis-cli -s s shutdown nosave; wait; ls *.rdb"##,
    );
}

#[test]
fn bind() {
    smoke(
        "bind",
        &["dig"],
        "dig -v 2>&1; dig @127.0.0.1 -p 9 +time=1 +tries=1 nothing.example >/dev/null 2>&1; echo $?",
    );
}

#[test]
fn varnish() {
    smoke(
        "varnish",
        &["/usr/sbin/varnishd", "curl", "gcc"],
        r##"
head -c 40000 /dev/zero >zeros; /usr/bin/python3 -m http.server --bind 127.0.0.1 $PORT2 >/dev/null 2>&1 & web=$!; until_open $PORT2
/usr/sbin/varnishd -F -n $PWD/v -a 127.0.0.1:$PORT -b 127.0.0.1:$PORT2 -s malloc,16m >log 2>&1 & cache=$!; until_open $PORT
for i in 1 2 3; do curl -s http://127.0.0.1:$PORT/zeros | md5sum; done; kill $cache; wait $cache; kill $web"##,
    );
}

#[test]
fn postgresql() {
    let bin = std::fs::read_dir("/usr/lib/postgresql")
        .ok()
        .and_then(|d| d.flatten().next());
    let Some(bin) = bin.map(|d| d.path().join("bin")) else {
        possible(
            "postgresql",
            Err("there is no postgresql (./run setup installs it)".to_owned()),
        );
        return;
    };
    let script = r##"
d=$(mktemp -d /var/tmp/faultless-pg-XXXXXX); chown postgres $d; as="runuser -u postgres --"
$as BIN/initdb -D $d/data >/dev/null 2>&1; echo initdb $?
$as BIN/pg_ctl -D $d/data -w -o "-k $d -c listen_addresses=" -l $d/log start >/dev/null; echo start $?
$as BIN/pgbench -h $d -i -s 1 -q postgres >/dev/null 2>&1; echo init $?
$as BIN/pgbench -h $d -t 50 -c 2 -n postgres 2>/dev/null | grep 'actually processed'
$as BIN/psql -h $d -At -c 'select count(*), sum(aid) from pgbench_accounts' postgres
$as BIN/pg_ctl -D $d/data -w -m fast stop >/dev/null; echo stop $?; rm -rf $d"##;
    smoke(
        "postgresql",
        &["runuser"],
        &script.replace("BIN", bin.to_str().expect("a plain path")),
    );
}

#[test]
fn nginx() {
    smoke(
        "nginx",
        &["/usr/sbin/nginx", "curl"],
        r##"
head -c 33554432 /dev/zero >big; cat >c <<END
daemon off; master_process on; worker_processes 2; user root; pid $PWD/pid; error_log $PWD/log;
events {} http { access_log off; server { listen 127.0.0.1:$PORT; root $PWD; sendfile off; } }
END
/usr/sbin/nginx -p $PWD -c $PWD/c & until_open $PORT
for i in 1 2; do curl -s http://127.0.0.1:$PORT/big | md5sum; done; kill $(cat pid); wait"##,
    );
}

#[test]
fn memcached() {
    smoke(
        "memcached",
        &["memcached"],
        r##"
memcached -u root -l 127.0.0.1 -p $PORT -t 2 & p=$!; until_open $PORT
exec 3<>/dev/tcp/127.0.0.1/$PORT; printf 'set a 0 0 5\r\nhello\r\nget a\r\nquit\r\n' >&3; cat <&3; kill $p; wait $p"##,
    );
}

#[test]
fn chromium() {
    // Its zygote aborts where it has more than one thread (docs/run.md), so what it maps is left below the default size.
    smoke_with(
        &BOTH[..1],
        "chromium",
        &["chromium"],
        r##"
echo '<p>a page</p><script>document.title = [1, 2, 3].map(x => x * 2).join()</script>' >page.html
chromium --headless --no-sandbox --disable-gpu --user-data-dir=$PWD/profile --dump-dom file://$PWD/page.html 2>/dev/null"##,
    );
}

#[test]
fn gcc() {
    smoke(
        "gcc",
        &["gcc", "make"],
        r##"
for i in $(seq 8); do echo "#include <stdio.h>
int f$i(int x) { return printf(\"%d\n\", x * $i); }" >f$i.c; done
{ for i in $(seq 8); do echo "int f$i(int);"; done; echo "int main(void) {"; for i in $(seq 8); do echo "f$i($i);"; done; echo "}"; } >main.c
printf 'prog: $(patsubst %%.c,%%.o,$(wildcard *.c))\n\tgcc -O2 -flto -o $@ $^\n%%.o: %%.c\n\tgcc -O2 -flto -c -o $@ $<\n' >Makefile
make -s -j2 && ./prog && md5sum prog"##,
    );
}

#[test]
fn git() {
    smoke(
        "git-clone",
        &["git"],
        r##"
export GIT_AUTHOR_DATE='2020-01-01T00:00Z' GIT_COMMITTER_DATE='2020-01-01T00:00Z' HOME=$PWD
git init -q a; cd a; git config user.name n; git config user.email e; seq 200000 >f; head -c 3000000 /dev/zero >g; git add .; git commit -qm one
seq 300000 >f; git commit -qam two; git gc -q; cd ..
git clone -q --no-hardlinks a b; cd b; git log --format=%H; git fsck 2>/dev/null; md5sum f"##,
    );
}

#[test]
fn apt() {
    smoke(
        "apt",
        &["apt-get"],
        "apt-get --simulate install sl 2>/dev/null | md5sum; apt-cache policy bash | md5sum",
    );
}

#[test]
fn tar() {
    smoke(
        "tar",
        &["tar", "xz"],
        r##"
mkdir d; for i in $(seq 50); do seq $i 2000 >d/$i; done; head -c 20000000 /dev/zero >d/zeros
tar -cf a.tar --sort=name --mtime=@0 --owner=0 --group=0 d; md5sum <a.tar; mkdir e; tar -xf a.tar -C e; tar -xf a.tar --overwrite -C e; diff -r d e/d && echo same
xz -T2 -1 <a.tar | xz -d | md5sum"##,
    );
}

#[test]
fn rsync() {
    smoke(
        "rsync",
        &["rsync"],
        r##"
mkdir a; for i in $(seq 50); do seq $i 3000 >a/$i; done; head -c 20000000 /dev/zero >a/zeros
rsync -a a/ b/; echo more >>a/7; rsync -a --checksum --inplace a/ b/; diff -r a b && echo same"##,
    );
}

#[test]
fn python_multiprocessing() {
    smoke(
        "python",
        &["/usr/bin/python3"],
        r##"
head -c 33554432 /dev/zero | tr '\0' 'x' >data; cat >p.py <<'END'
import mmap, multiprocessing as m, os
def part(i):
    f = os.open("data", os.O_RDONLY); a = mmap.mmap(f, 0, mmap.MAP_SHARED, mmap.PROT_READ); os.close(f)
    return i, sum(a[i << 20:(i + 1) << 20])
if __name__ == "__main__":
    for way in ("fork", "spawn", "forkserver"):
        with m.get_context(way).Pool(4) as p: print(way, sorted(p.map(part, range(32)))[:3])
END
/usr/bin/python3 p.py"##,
    );
}

#[test]
fn node() {
    smoke(
        "node",
        &["node"],
        r##"
node -e 'const { Worker, isMainThread, parentPort } = require("worker_threads"); const c = require("crypto");
const h = c.createHash("sha256"); for (let i = 0; i < 100; i++) h.update(Buffer.alloc(100000, i)); console.log(h.digest("hex"));
new Worker("require(\"worker_threads\").parentPort.postMessage(require(\"fs\").readFileSync(process.execPath).length)", { eval: true }).on("message", n => console.log(n > 1000))'"##,
    );
}

#[test]
fn java() {
    smoke(
        "java",
        &["java", "javac"],
        r##"
cat >A.java <<'END'
import java.nio.*; import java.nio.channels.*; import java.nio.file.*;
class A { public static void main(String[] a) throws Exception {
  Path p = Path.of("data"); Files.write(p, new byte[32 << 20]);
  try (FileChannel c = FileChannel.open(p)) { MappedByteBuffer b = c.map(FileChannel.MapMode.READ_ONLY, 0, c.size()); long s = 0; for (int i = 0; i < b.limit(); i += 4096) s += b.get(i) + 1; System.out.println(s); }
  try { Object o = null; o.hashCode(); } catch (NullPointerException e) { System.out.println("caught"); } } }
END
javac A.java && java -Xmx64m A"##,
    );
}

#[test]
fn gdb() {
    smoke(
        "gdb",
        &["gdb", "gcc"],
        r##"
echo 'int f(int x) { return x + 1; } int main(void) { return f(41); }' >a.c; gcc -g -O0 -o a a.c
gdb -q -batch -nx -ex 'break f' -ex run -ex 'print x' -ex finish -ex continue ./a 2>/dev/null | grep -E '^\$1|Value returned|exited' | sed 's,process [0-9]*,process N,'"##,
    );
}

#[test]
fn valgrind() {
    smoke(
        "valgrind",
        &["valgrind", "gcc"],
        r##"
echo '#include <stdlib.h>
int main(void) { char *p = malloc(10); p[3] = 1; free(p); return 7; }' >a.c; gcc -g -o a a.c
valgrind -q --error-exitcode=9 ./a; echo $?"##,
    );
}

#[test]
fn sqlite() {
    smoke(
        "sqlite",
        &["sqlite3"],
        r##"
sqlite3 d.db 'pragma mmap_size=268435456; create table t(a integer primary key, b); with recursive n(i) as (select 1 union all select i+1 from n where i<200000) insert into t select i, hex(i*7) from n;
select count(*), sum(length(b)) from t; update t set b = b || "x" where a % 3 = 0; select sum(length(b)) from t; vacuum; pragma integrity_check;'"##,
    );
}

#[test]
fn perl() {
    smoke(
        "perl",
        &["perl"],
        r##"
perl -MDigest::SHA=sha1_hex -MPOSIX -e '$|=1; my %h; $h{$_ % 1000} += $_ for 1..200000; print sha1_hex(join ",", map {"$_=$h{$_}"} sort keys %h), "\n"; my $p = fork // die; if (!$p) { print `echo child`; POSIX::_exit(3) } waitpid $p, 0; print $? >> 8, "\n"; system("exit 4"); print $? >> 8, "\n"'"##,
    );
}

#[test]
fn openssl() {
    smoke(
        "openssl",
        &["openssl"],
        r##"
head -c 33554432 /dev/zero >z; openssl dgst -sha256 z; openssl enc -aes-128-ctr -K 00 -iv 00 -in z 2>/dev/null | md5sum
openssl req -x509 -newkey rsa:2048 -nodes -keyout k -out c -subj /CN=a -days 1 2>/dev/null; openssl verify -CAfile c c"##,
    );
}
