#!/bin/busybox sh
# The first process of a guest: mounts the disks, runs the tests, and switches the machine off.
/bin/busybox --install -s /bin
export PATH=/bin:/t HOME=/tmp
mkdir -p /proc /sys /dev /t /d /tmp /run
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev 2>/dev/null
mount -t tracefs trace /sys/kernel/tracing
mount -t tmpfs tmp /tmp
mkdir -p /dev/shm
mount -t tmpfs shm /dev/shm
for module in $(cat /modules.list); do
    case $module in
    # A device in memory. Each read takes 5 ms, however many there are.
    null_blk.ko) insmod "/modules/$module" gb=1 bs=4096 memory_backed=1 irqmode=2 completion_nsec=5000000 hw_queue_depth=256 ;;
    *) insmod "/modules/$module" ;;
    esac
done
ulimit -l unlimited
for i in 1 2 3 4 5 6 7 8 9 10; do [ -b /dev/vdb ] && break; sleep 0.2; done
mount -t ext4 -o ro /dev/vda /t || echo "guest: no disk with the programs"
mount -t ext4 /dev/vdb /d || echo "guest: no disk for data"
mkdir -p /lib /usr
ln -s /t/lib64 /lib64
ln -s /t/lib/x86_64-linux-gnu /lib/x86_64-linux-gnu
script=guest.sh
grep -q faultless=delay /proc/cmdline && script=delay.sh
sh /t/$script >/dev/ttyS1 2>/dev/ttyS0
sync
poweroff -f
