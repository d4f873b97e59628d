# What is tried in a guest. Standard output is JSON, an object in each line; standard error is the console.
cd /d

. /t/tell.sh

faultless doctor --json >/tmp/doctor && document doctor /tmp/doctor

common="--file /d/bench.data --size 64M --memory 64M --threads 2 --seconds 2 --rounds 1 --json"
faultless bench quiet $common --contenders mmap,pread,uffd-monitor,faultless,faultless-load >/tmp/bench 2>/tmp/err
status=$?
[ $status = 0 ] && document library /tmp/bench
tell bench library $status /tmp/err
if faultless run --backend live -- /t/faultless --version >/dev/null 2>/tmp/said; then
    faultless bench quiet $common --contenders mmap,faultless-live,faultless-marked >/tmp/bench 2>/tmp/err
    status=$?
    [ $status = 0 ] && document live /tmp/bench
    tell bench live $status /tmp/err
fi
faultless bench quiet $common --unmodified >/tmp/bench 2>/tmp/err
status=$?
[ $status = 0 ] && document programs /tmp/bench
tell bench programs $status /tmp/err

for program in shape holes signals storm live written reclaimed handed_on; do
    # (That one waits for markers, and finds none by itself.)
    if [ $program = reclaimed ]; then echo good >/tmp/bare; else /t/test-$program /d/test.data >/tmp/bare 2>/dev/null; fi
    for backend in stand-in live; do
        # Those last ones are about live mappings.
        case $program-$backend in live-stand-in | written-stand-in | reclaimed-stand-in | handed_on-stand-in) continue ;; esac
        if ! faultless run --backend $backend -- /t/faultless --version >/dev/null 2>/tmp/said; then
            tell "run-$backend" $program 77 /tmp/said
            continue
        fi
        : >/tmp/said
        faultless run --backend $backend --eager --stats -- /t/test-$program /d/test.data >/tmp/out 2>/tmp/err
        status=$?
        if [ $status = 0 ] && ! cmp -s /tmp/bare /tmp/out; then status=1; fi
        if [ $status != 0 ]; then grep -E 'faultless:|test-|\.c:' /tmp/err | grep -v process >/tmp/said; else grep -m 1 'taken over' /tmp/err >/tmp/said; fi
        tell "run-$backend" $program $status /tmp/said
        rm -f /d/test.data
    done
done

faultless observe --json -- /t/test-storm /d/test.data >/tmp/out 2>/tmp/err
status=$?
grep -m 1 'faultless:' /tmp/err >/tmp/said
tell observe observe $status /tmp/said

# A holder of mmap_lock that sleeps, for a thread that holds a mapping's own lock: `observe` names that thread. (MADV_DONTNEED takes the
# mapping's lock alone since Linux 6.17.)
case $(uname -r) in
[1-5].* | 6.[0-9].* | 6.1[0-6].*)
    echo "MADV_DONTNEED takes mmap_lock before Linux 6.17" >/tmp/said
    tell observe mapping 77 /tmp/said
    ;;
*)
    dd if=/dev/zero of=/d/cold.data bs=1M count=64 2>/dev/null && sync
    echo go | CONVOY_MIB=256 faultless observe --json -- /t/test-convoy vma 12 /d/cold.data >/tmp/out 2>/tmp/err
    grep -o 'waits until keeper ([0-9]*) lets go of a VMA (madvise)' /tmp/out >/tmp/said
    status=$?
    if [ $status != 0 ]; then { echo "no keeper is named:" && grep -v observing /tmp/err; } | tr '\n' ' ' >/tmp/said; fi
    tell observe mapping $status /tmp/said
    ;;
esac
dmesg | grep -E 'Oops|BUG:|WARNING:' >/tmp/said
tell dmesg dmesg $(wc -l </tmp/said) /tmp/said
