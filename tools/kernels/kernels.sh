#!/bin/bash
# Boots Debian's kernels in QEMU, tries Faultless on each, and prints one table.
#
#   ./run kernels [VERSION…]           such as 6.1 6.12 6.18 7.3 (all four by default)
#   ./run kernels --delay [VERSION…]   how fast each contender reads where a read takes 5 ms, alone and beside threads that map and unmap
#
# Packages are fetched by name, with lists of this script's own: nothing of the system's is changed but for the packages that it
# installs (QEMU, busybox, cpio and the like). Everything else lies in target/kernels. It takes about two minutes for each kernel, by software
# emulation: counts mean something there, times do not.
#
# ACCEL=kvm uses the processor's virtualisation. What the guests said on their consoles stays in target/kernels/out.
#
# Exit status: 1 if a byte was wrong or a test failed on one of the kernels, 2 for usage, 3 if a kernel or QEMU cannot be fetched here.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
tree=$(cd "$here/../.." && pwd)
work=$tree/target/kernels
mode=tests
[ "${1:-}" != --delay ] || { mode=delay; shift; }
versions=("$@")
[ ${#versions[@]} -gt 0 ] || versions=(6.1 6.12 6.18 7.3)
# Seconds that one kernel may take. A budget, not a measurement.
limit=900

say() { echo "kernels: $*" >&2; }
fail() { say "$*"; exit 3; }

[ "$(uname -m)" = x86_64 ] || fail "the machine is $(uname -m); the kernels that are fetched are for x86_64"
[ "$(id -u)" -eq 0 ] || fail "root is needed to install packages and to make device nodes; use sudo"
[ -f /etc/debian_version ] || fail "this system has no /etc/debian_version; the kernels are Debian's packages"
for version in "${versions[@]}"; do
    [[ $version =~ ^[0-9]+\.[0-9]+$ ]] || { say "$version is no version of a kernel; name it as 6.12 or 7.3"; exit 2; }
done
mkdir -p "$work"/{apt/lists/partial,apt/cache/archives/partial,packages,kernels,out}

# ---- packages

# The mirror is the system's own: the first that ends in /debian.
lists() {
    local mirror
    mirror=$(cat /etc/apt/sources.list /etc/apt/sources.list.d/* 2>/dev/null | grep -v '^ *#' |
        grep -oE '[a-z]+://[^ ]+/debian/?( |$)' | sed 's|/* *$||; 1q' || true)
    [ -n "$mirror" ] || mirror=http://deb.debian.org/debian
    local key=[signed-by=/usr/share/keyrings/debian-archive-keyring.gpg]
    printf 'deb %s main\n' "$key $mirror bookworm" "$key $mirror-security bookworm-security" \
        "$key $mirror bookworm-backports" "$key $mirror trixie-backports" >"$work/apt/sources.list"
    cat >"$work/apt/conf" <<END
Dir::Etc::sourcelist "$work/apt/sources.list";
Dir::Etc::sourceparts "/dev/null";
Dir::State::Lists "$work/apt/lists";
Dir::Cache "$work/apt/cache";
Acquire::Languages "none";
APT::Sandbox::User "root";
END
    APT_CONFIG=$work/apt/conf apt-get update -qq || fail "the lists of Debian's packages cannot be fetched from $mirror"
}

fetch() { (cd "$work/packages" && APT_CONFIG=$work/apt/conf apt-get download -qq "$@") || fail "$* cannot be fetched"; }

# The newest package whose name matches.
newest() { APT_CONFIG=$work/apt/conf apt-cache search --names-only "$1" | cut -d' ' -f1 | sort -V | tail -n 1; }

# Fetches a kernel and its modules, in whichever layout Debian has it, and says which it is.
kernel() {
    local version=$1 dots=${1//./\\.} name release
    release=$(find "$work/kernels/boot" -name "vmlinuz-$version*" 2>/dev/null | grep -E "/vmlinuz-$dots[^0-9]" | sed 's|.*/vmlinuz-||' | sort -V | tail -n 1 || true)
    if [ -z "$release" ]; then
        [ -f "$work/apt/conf" ] || lists
        name=$(newest "^linux-binary-$dots[.0-9]*[^ ]*cloud-amd64\$")
        if [ -n "$name" ]; then
            fetch "$name" "${name/binary/modules}"
        else
            name=$(newest "^linux-image-$dots\\.[^ ]*cloud-amd64(-unsigned)?\$")
            [ -n "$name" ] || fail "Debian has no kernel $version for virtual machines (linux-image-$version…-cloud-amd64); choose another version"
            fetch "$name"
        fi
        local package
        for package in "$work"/packages/linux-*"$version"*.deb; do dpkg-deb -x "$package" "$work/kernels"; done
        mkdir -p "$work/kernels/boot" "$work/kernels/lib/modules"
        if [ -d "$work/kernels/usr/lib/modules" ]; then
            cp -al "$work/kernels/usr/lib/modules/." "$work/kernels/lib/modules/"
            rm -r "$work/kernels/usr/lib/modules"
        fi
        local image
        for image in "$work"/kernels/lib/modules/*/vmlinuz; do
            [ -f "$image" ] && mv "$image" "$work/kernels/boot/vmlinuz-$(basename "$(dirname "$image")")"
        done
        release=$(ls "$work/kernels/lib/modules" | grep -E "^$dots[^0-9]" | sort -V | tail -n 1)
        depmod -b "$work/kernels" "$release" 2>/dev/null || true
    fi
    echo "$release"
}

# QEMU before 8 now and then lets a guest die of "Oops: int3". A newer one runs beside the system's, and needs no other library.
qemu() {
    local major
    major=$(qemu-system-x86_64 --version | sed -n 's/.*version \([0-9]*\).*/\1/p')
    if [ "$major" -ge 8 ]; then echo qemu-system-x86_64; return; fi
    if [ ! -d "$work/qemu" ]; then
        [ -f "$work/apt/conf" ] || lists
        fetch qemu-system-x86/bookworm-backports qemu-system-common/bookworm-backports qemu-system-data/bookworm-backports seabios/bookworm-backports
        local package
        for package in "$work"/packages/{qemu-system-*,seabios_*}.deb; do dpkg-deb -x "$package" "$work/qemu.partial"; done
        mv "$work/qemu.partial" "$work/qemu"
    fi
    echo "$work/qemu/usr/bin/qemu-system-x86_64 -L $work/qemu/usr/share/qemu -L $work/qemu/usr/share/seabios"
}

# ---- disks

# The first program's disk: the modules that it takes to see the others.
initrd() {
    local release=$1 root module file
    root=$(mktemp -d)
    mkdir -p "$root"/{bin,modules,dev}
    cp /bin/busybox "$root/bin/"
    install -m 755 "$here/init.sh" "$root/init"
    mknod "$root/dev/console" c 5 1
    mknod "$root/dev/null" c 1 3
    for module in virtio_pci virtio_blk fuse $([ $mode = tests ] || echo null_blk); do
        # (What is built in gives nothing.)
        { modprobe -d "$work/kernels" -S "$release" --show-depends "$module" 2>/dev/null || true; } | sed -n 's/^insmod \([^ ]*\).*/\1/p'
    done | awk '!seen[$0]++' | while read -r file; do
        local name
        name=$(basename "$file" .xz)
        case $file in *.xz) xz -dc "$file" >"$root/modules/$name" ;; *) cp "$file" "$root/modules/$name" ;; esac
        echo "$name"
    done >"$root/modules.list"
    (cd "$root" && find . | cpio -o -H newc --quiet) | gzip -1 >"$work/initrd-$release.gz"
    rm -r "$root"
}

# The disk with Faultless, the test programs and the libraries of both.
tools() {
    local root=$work/tools program library
    rm -rf "$root"
    mkdir -p "$root/lib64" "$root/lib/x86_64-linux-gnu"
    cp "$here/tell.sh" "$here/guest.sh" "$here/delay.sh" "$(command -v mkfs.ext4 || echo /sbin/mkfs.ext4)" "$root/"
    for program in faultless libfaultless_preload.so; do strip -o "$root/$program" "$tree/target/release/$program"; done
    for program in live written shape holes signals storm reclaimed handed_on convoy; do
        cc -O1 -pthread -o "$root/test-$program" "$tree/crates/faultless-cli/tests/programs/$program.c"
    done
    for program in faultless libfaultless_preload.so test-live mkfs.ext4; do ldd "$root/$program"; done |
        grep -o '/lib[^ ]*' | sort -u | while read -r library; do
        case $library in /lib64/*) cp -L "$library" "$root/lib64/" ;; *) cp -L "$library" "$root/lib/x86_64-linux-gnu/" ;; esac
    done
    rm -f "$work/tools.img" "$work/data.img"
    mkfs.ext4 -q -O ^has_journal -d "$root" "$work/tools.img" 200M >/dev/null
    mkfs.ext4 -q "$work/data.img" 1G >/dev/null
}

# ---- one kernel

boot() {
    local release=$1 out=$work/out/$1
    rm -f "$out".*
    # shellcheck disable=SC2046
    timeout "$limit" $(qemu) -accel "${ACCEL:-tcg,thread=multi}" -cpu max -smp 2 -m 3G -nographic -no-reboot -nodefaults \
        -serial "file:$out.console" -serial "file:$out.json" \
        -kernel "$work/kernels/boot/vmlinuz-$release" -initrd "$work/initrd-$release.gz" -append "console=ttyS0 quiet panic=-1 faultless=$mode" \
        -drive "file=$work/tools.img,if=virtio,format=raw,readonly=on" -drive "file=$work/data.img,if=virtio,format=raw,snapshot=on" </dev/null
}

packages=(qemu-system-x86 busybox-static cpio xz-utils kmod e2fsprogs gcc libc6-dev binutils python3)
missing=()
for package in "${packages[@]}"; do
    dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q 'install ok installed' || missing+=("$package")
done
if [ ${#missing[@]} -gt 0 ]; then
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
fi
(cd "$tree" && cargo build --release --quiet --locked)
tools
releases=()
for version in "${versions[@]}"; do
    release=$(kernel "$version")
    initrd "$release"
    releases+=("$release")
done
for release in "${releases[@]}"; do
    [ ! -t 2 ] || say "$release …"
    boot "$release" || say "$release: the machine ended with status $? (124: it took more than $limit s)"
    if grep -aq 'Oops: int3' "$work/out/$release.console"; then
        say "$release: QEMU let the guest die of an int3 that was patched meanwhile; once more"
        boot "$release" || true
    fi
done
python3 "$here/table.py" "$mode" "${releases[@]/#/$work/out/}"
