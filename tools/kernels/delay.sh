# What neighbours cost where each read takes 5 ms, whatever else is read meanwhile: a device in the guest's memory (null_blk). Standard output
# is JSON, an object in each line; standard error is the console.
. /t/tell.sh

refuse() {
    echo "$1" >/tmp/said
    tell delay delay 77 /tmp/said
    exit
}
[ "$(cat /sys/module/null_blk/parameters/completion_nsec 2>/dev/null)" = 5000000 ] || refuse "this kernel has no module null_blk"
mkfs.ext4 -q /dev/nullb0 >&2 && mkdir -p /n && mount -t ext4 /dev/nullb0 /n || refuse "the device in memory cannot be made or mounted"
common="--file /n/bench.data --size 256M --memory 128M --threads 8 --seconds 4 --rounds 2 --json"
for scenario in quiet churn; do
    for kind in library programs; do
        what="--contenders mmap,pread,faultless,faultless-load,faultless-live,faultless-marked"
        [ $kind = programs ] && what=--unmodified
        faultless bench $scenario $common $what >/tmp/bench 2>/tmp/err && document "$kind-$scenario" /tmp/bench
        status=$?
        tell delay "$kind-$scenario" $status /tmp/err
    done
done
