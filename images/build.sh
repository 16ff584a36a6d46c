#!/usr/bin/env bash
# Builds the test guests into .cache/images/, unless they are there already.
#
#   images/build.sh [tiny|bare|all]
#
# A guest is rebuilt when its recipe changes or when apt offers a newer cloud
# kernel. Each build happens in a directory of its own that then takes the old
# one's place, so an interrupted build leaves what was there before. Needs the
# packages that images/setup.sh installs. Steps are told on stderr.
set -euo pipefail

images=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cache=$(dirname "$images")/.cache
out=$cache/images
kernels=$cache/kernels

say() { printf 'images: %s\n' "$*" >&2; }
die() { say "failed: $*"; exit 1; }

# The recipe's identity: its files, the compiler, and what else goes in.
recipe_hash() { # guest extra...
    local guest=$1
    shift
    {
        (cd "$images" && sha256sum build.sh common/* "$guest"/*)
        gcc --version | head -n 1
        printf '%s\n' "$@"
    } | sha256sum | cut -c 1-16
}

is_current() { # guest hash
    [ "$(cat "$out/$1/recipe" 2>/dev/null)" = "$2" ]
}

publish() { # guest hash directory
    echo "$2" >"$3/recipe"
    chmod -R a+rX "$3"
    rm -rf "$out/$1.old"
    [ ! -e "$out/$1" ] || mv -T "$out/$1" "$out/$1.old"
    mv -T "$3" "$out/$1"
    rm -rf "$out/$1.old"
    say "$1: built"
}

newest_kernel_package() {
    apt-cache pkgnames linux-image- 2>/dev/null |
        grep -E '^linux-image-[0-9].*-cloud-amd64$' | sort -V | tail -n 1 || true
}

# Leaves the package's vmlinuz and virtio_blk module in $kernels/PACKAGE.
fetch_kernel() { # package
    local package=$1 work
    [ ! -e "$kernels/$package/vmlinuz" ] || return 0
    say "tiny: downloading $package (about 35 MB)"
    work=$(mktemp -d "$scratch/kernel.XXXX")
    (
        cd "$work"
        download() { apt-get -qq -o APT::Sandbox::User=root download "$package" >&2; }
        # Package lists that have grown old name files which are no longer there.
        download || { apt-get -qq update >&2 && download; }
    ) || die "apt can not download $package"
    say "tiny: unpacking the kernel"
    dpkg-deb --fsys-tarfile "$work"/*.deb |
        tar -x -C "$work" --wildcards './boot/vmlinuz-*' '*/drivers/block/virtio_blk.ko*'
    mkdir "$work/kernel"
    mv "$work"/boot/vmlinuz-* "$work/kernel/vmlinuz"
    find "$work" -name 'virtio_blk.ko*' -exec mv {} "$work/kernel/" \;
    [ ! -e "$work/kernel/virtio_blk.ko.xz" ] || xz -d "$work/kernel/virtio_blk.ko.xz"
    mkdir -p "$kernels"
    rm -rf "${kernels:?}/$package"
    mv -T "$work/kernel" "$kernels/$package"
}

build_tiny() {
    local package hash work root
    package=$(newest_kernel_package)
    if [ -z "$package" ]; then # no package lists: what was fetched earlier will do
        package=$(ls "$kernels" 2>/dev/null | sort -V | tail -n 1)
    fi
    [ -n "$package" ] || die "apt knows no linux-image-*-cloud-amd64; run images/setup.sh"
    hash=$(recipe_hash tiny "$package" "$(sha256sum </bin/busybox)")
    is_current tiny "$hash" && { say "tiny: up to date ($package)"; return; }
    fetch_kernel "$package"
    say "tiny: compiling the worker, packing the initramfs"
    work=$(mktemp -d "$scratch/tiny.XXXX")
    root=$work/root
    mkdir -p "$root"/{bin,dev,proc,modules} "$work/out"
    cp /bin/busybox "$root/bin/busybox"
    install -m 755 "$images/tiny/init" "$root/init"
    cp "$kernels/$package"/*.ko "$root/modules/" 2>/dev/null || true # built in, in some kernels
    gcc -O2 -std=gnu11 -Wall -Wextra -Werror -static -s -pthread -I"$images/common" \
        "$images/tiny/guest.c" -o "$root/guest"
    (cd "$root" && find . | LC_ALL=C sort | cpio -o -H newc -R 0:0 --quiet) |
        gzip -1 -n >"$work/out/initrd"
    cp "$kernels/$package/vmlinuz" "$work/out/vmlinuz"
    echo "$package" >"$work/out/kernel"
    publish tiny "$hash" "$work/out"
}

build_bare() {
    local hash work
    hash=$(recipe_hash bare)
    is_current bare "$hash" && { say "bare: up to date"; return; }
    say "bare: compiling"
    work=$(mktemp -d "$scratch/bare.XXXX")
    gcc -m32 -march=i686 -mno-sse -mno-mmx -O2 -std=gnu11 -Wall -Wextra -Werror \
        -ffreestanding -nostdlib -static -fno-pie -no-pie -fno-stack-protector \
        -fno-asynchronous-unwind-tables -Wl,--build-id=none,--no-warn-rwx-segments \
        -I"$images/common" -T "$images/bare/guest.ld" "$images/bare/guest.c" -o "$work/guest.elf"
    publish bare "$hash" "$work"
}

guest=${1:-all}
case $guest in
tiny | bare | all) ;;
*) echo "usage: images/build.sh [tiny|bare|all]" >&2; exit 2 ;;
esac
mkdir -p "$out"
exec 9>"$cache/images.lock" # one build at a time
flock 9
rm -rf "$cache"/build.* # of a build that was killed
scratch=$(mktemp -d "$cache/build.XXXX")
trap 'rm -rf "$scratch"' EXIT
[ "$guest" = bare ] || build_tiny
[ "$guest" = tiny ] || build_bare
