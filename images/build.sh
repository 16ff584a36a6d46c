#!/usr/bin/env bash
# Builds the test guests into .cache/images/, unless they are there already.
#
#   images/build.sh [tiny|stock|bare|debian|host [SERIES]|host-CODENAME|base|all]
#
# `all` is what the tests need: tiny, stock and bare. `stock` is tiny with the kernel of Debian's
# installations on hardware, 70 MB, for tests of what cloud kernels lack. `debian` is for
# benchmarks, and takes a download of about 90 MB from the mirrors in this machine's apt
# configuration.
# `host` is for the tests of tests/hosts and tests/kernels, and takes 150 MB, some of it
# from the package index in pip's configuration. SERIES is its kernel: `6.1`, for instance,
# `newest` of all that Debian's suites offer, else the newest that apt offers here.
# `host-trixie` is such a host of another release of Debian's, with the kernel of `host`.
# `base` is no guest: a minimal Debian 12 in a tar file, for the container's image (60 MB).
# A guest is rebuilt when its recipe changes or when apt offers a newer cloud
# kernel. Each build happens in a directory of its own that then takes the old
# one's place, so an interrupted build leaves what was there before. Needs the
# packages that images/setup.sh installs. Steps are told on stderr.
set -euo pipefail

images=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cache=$(dirname "$images")/.cache
out=$cache/images
kernels=$cache/kernels
modules="virtio_ring virtio virtio_pci_legacy_dev virtio_pci_modern_dev virtio_pci"
modules+=" virtio_blk virtio_balloon virtio_mem" # in an order in which they can be loaded
newer_suites="trixie-backports"
host_python=$(dirname "$images")/.venv/bin/python
. "$images/apt.sh"

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

# The newest package, or what was fetched earlier where there are no package lists.
kernel_package() { # flavour, cloud without one
    local flavour=${1--cloud} package
    package=$(apt-cache pkgnames linux-image- 2>/dev/null | of_flavour "$flavour")
    [ -n "$package" ] || package=$(ls "$kernels" 2>/dev/null | of_flavour "$flavour")
    [ -n "$package" ] || die "apt knows no linux-image-*$flavour-amd64; run images/setup.sh"
    echo "$package"
}

of_flavour() { # flavour
    grep -E "^linux-image-[0-9][^a-z]*(\+[a-z0-9]+)?$1-amd64\$" | sort -V | tail -n 1 || true
}

# The newest package of a series that Debian offers, or what was fetched earlier.
series_package() { # series
    local series=$1 package
    prepare_apt # what this machine knows already comes first: it takes no download
    package=$(newest_of "$series")
    if [ -z "$package" ]; then
        prepare_apt "$release-backports" $newer_suites
        package=$(newest_of "$series")
    fi
    [ -n "$package" ] || package=$(ls "$kernels" 2>/dev/null | of_series "$series")
    [ -n "$package" ] || die "no suite of Debian's offers a cloud kernel $series"
    echo "$package"
}

newest_of() { # series
    [ "$1" != newest ] || prepare_apt "$release-backports" $newer_suites
    apt_here apt-cache pkgnames linux-image- | of_series "$1"
}

of_series() { # series
    local number=${1//./\.}
    [ "$1" != newest ] || number='[0-9]+'
    grep -E "^linux-image-$number\.[0-9].*-cloud-amd64\$" | sort -V | tail -n 1 || true
}

# The package, and those of its own dependencies that bring what it has not: from Linux 7 on
# Debian keeps vmlinuz in linux-binary-* and the modules in linux-modules-*.
kernel_parts() { # package
    echo "$1"
    apt_here apt-cache depends "$1" |
        sed -n -E 's/^ *Depends: (linux-(binary|modules)-.*)/\1/p'
}

# Leaves the package's vmlinuz and $modules, those not built in, in $kernels/PACKAGE.
fetch_kernel() { # package
    local package=$1 work module deb vmlinuz
    [ "$(cat "$kernels/$package/modules" 2>/dev/null)" != "$modules" ] || return 0
    say "downloading $package (35 to 70 MB)"
    work=$(mktemp -d "$scratch/kernel.XXXX")
    (
        cd "$work"
        [ -d "$scratch/sources" ] || prepare_apt
        download() { apt_here apt-get download $(kernel_parts "$package") >&2; }
        # Package lists that have grown old name files which are no longer there.
        download || { apt_here apt-get update >&2 && download; }
    ) || die "apt cannot download $package"
    say "unpacking the kernel"
    for deb in "$work"/*.deb; do
        dpkg-deb -x "$deb" "$work/root"
    done
    mkdir "$work/kernel"
    vmlinuz=$(find "$work/root" -type f -name 'vmlinuz*')
    [ -f "$vmlinuz" ] || die "$package and its parts do not have one vmlinuz"
    mv "$vmlinuz" "$work/kernel/vmlinuz"
    for module in $modules; do
        find "$work/root" -name "$module.ko*" -exec mv {} "$work/kernel/" \;
    done
    find "$work/kernel" -name '*.ko.xz' -exec xz -d {} +
    echo "$modules" >"$work/kernel/modules"
    mkdir -p "$kernels"
    rm -rf "${kernels:?}/$package"
    mv -T "$work/kernel" "$kernels/$package"
}

# The kernel, and an initramfs of a directory with the kernel's modules added.
pack_initrd() { # package directory out
    local module number=10
    for module in $modules; do
        # Those that are not there are built in.
        cp "$kernels/$1/$module.ko" "$2/modules/$number-$module.ko" 2>/dev/null || true
        number=$((number + 1))
    done
    (cd "$2" && find . | LC_ALL=C sort | cpio -o -H newc -R 0:0 --quiet) |
        gzip -1 -n >"$3/initrd"
    cp "$kernels/$1/vmlinuz" "$3/vmlinuz"
    echo "$1" >"$3/kernel"
}

build_tiny() {
    build_worker tiny "$(kernel_package)"
}

build_stock() {
    build_worker stock "$(kernel_package "")"
}

# The worker in an initramfs, and the kernel of a package.
build_worker() { # name package
    local name=$1 package=$2 hash work root
    hash=$(recipe_hash tiny "$package" "$(sha256sum </bin/busybox)")
    is_current "$name" "$hash" && { say "$name: up to date ($package)"; return; }
    fetch_kernel "$package"
    say "$name: compiling the worker, packing the initramfs"
    work=$(mktemp -d "$scratch/$name.XXXX")
    root=$work/root
    mkdir -p "$root"/{bin,dev,proc,modules} "$work/out"
    cp /bin/busybox "$root/bin/busybox"
    install -m 755 "$images/tiny/init" "$root/init"
    gcc -O2 -std=gnu11 -Wall -Wextra -Werror -static -s -pthread -I"$images/common" \
        "$images/tiny/guest.c" -o "$root/guest"
    pack_initrd "$package" "$root" "$work/out"
    publish "$name" "$hash" "$work/out"
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

# This machine's own Debian mirrors as lines of a sources.list.
debian_sources() { # codename
    prepare_apt "$1"
    apt_here apt-get indextargets --format '$(ORIGIN)|$(REPO_URI) $(RELEASE) $(COMPONENT)' \
        'Created-By: Packages' 'Component: main' |
        sed -n -E "s/^Debian\|(.* $1(-security)? main)\$/deb \1/p" | sort -u
}

# A Debian of that release with these packages, in a directory.
bootstrap() { # codename directory packages
    local sources options=() setting
    mapfile -t sources < <(debian_sources "$1")
    [ ${#sources[@]} -gt 0 ] || die "apt knows no Debian mirror for $1; try apt-get update"
    while read -r setting; do # a proxy, where one is set
        options+=(--aptopt="$setting")
    done < <(apt-config dump --format '%F "%v";%n' | grep -E '^Acquire::[a-z]+::Proxy' || true)
    for setting in doc man locale info; do
        options+=(--dpkgopt="path-exclude=/usr/share/$setting/*")
    done
    mmdebstrap --quiet --mode=root --variant=minbase --format=directory \
        --include="$3" \
        --aptopt='APT::Sandbox::User "root"' "${options[@]}" "$1" "$2" "${sources[@]}" >&2
}

build_debian() {
    local package codename hash work root initrd
    for tool in mmdebstrap mke2fs; do
        command -v $tool >/dev/null || die "no $tool; run images/setup.sh"
    done
    [ "$(id -u)" = 0 ] || die "debian: be root"
    package=$(kernel_package)
    codename=$release
    hash=$(recipe_hash debian "$package" "$codename" "$(sha256sum </bin/busybox)")
    is_current debian "$hash" && { say "debian: up to date ($codename, $package)"; return; }
    fetch_kernel "$package"
    say "debian: installing $codename with nginx, python and redis (half a minute)"
    work=$(mktemp -d "$scratch/debian.XXXX")
    root=$work/root
    initrd=$work/initrd
    bootstrap "$codename" "$root" nginx-light,python3-minimal,redis-server
    say "debian: packing"
    mkdir -p "$root/vmdedup" "$initrd"/{bin,dev,disk,modules} "$work/out"
    install -m 755 /bin/busybox "$images/debian/start" "$root/vmdedup/"
    install -m 644 "$images"/debian/{nginx.conf,worker.py} "$root/vmdedup/"
    gcc -O2 -std=gnu11 -Wall -Wextra -Werror -static -s "$images/debian/probe.c" \
        -o "$root/vmdedup/probe"
    mke2fs -q -t ext4 -O '^has_journal,^metadata_csum' -d "$root" "$work/out/disk" 400M >&2
    cp /bin/busybox "$initrd/bin/busybox"
    install -m 755 "$images/debian/init" "$initrd/init"
    pack_initrd "$package" "$initrd" "$work/out"
    publish debian "$hash" "$work/out"
}

# What vmdedup requires, one requirement a line.
requirements() {
    "$host_python" - "$(dirname "$images")/pyproject.toml" <<'END'
import sys, tomllib
with open(sys.argv[1], "rb") as file:
    print(*tomllib.load(file)["project"]["dependencies"], sep="\n")
END
}

# What vmdedup requires, built for the Python of a Debian in a directory.
install_requirements() { # directory
    local version target
    version=$(chroot "$1" python3 -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    target=$1/usr/local/lib/python$version/dist-packages
    requirements >"$1/requirements.txt"
    "$host_python" -m pip install --quiet --disable-pip-version-check --no-warn-conflicts \
        --target "$target" --python-version "$version" --implementation cp \
        --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 \
        --platform manylinux2014_x86_64 --only-binary=:all: --no-compile \
        -r "$1/requirements.txt" >&2
    rm -r "$target/bin" "$1/requirements.txt"
    chroot "$1" python3 -m compileall -q "/usr/local/lib/python$version/dist-packages" >&2
}

build_host() { # codename, or nothing
    local codename=${1:-$release} name=host${1:+-$1} hash work root
    for tool in mmdebstrap mke2fs; do
        command -v $tool >/dev/null || die "no $tool; run images/setup.sh"
    done
    "$host_python" -c 'import pip' 2>/dev/null || die "no pip in .venv; run images/setup.sh"
    [ "$(id -u)" = 0 ] || die "host: be root"
    hash=$(recipe_hash host "$codename" "$(requirements)")
    is_current "$name" "$hash" && { say "$name: up to date ($codename)"; return; }
    say "$name: installing $codename with systemd, QEMU and Python (a minute or more)"
    work=$(mktemp -d "$scratch/host.XXXX")
    root=$work/root
    bootstrap "$codename" "$root" \
        dbus,iproute2,procps,python3,qemu-system-x86,systemd,systemd-sysv,udev
    say "host: installing what vmdedup requires"
    install_requirements "$root"
    say "host: packing"
    mkdir -p "$root"/{vmdedup,payload} "$work/out"
    install -m 755 "$images/host/agent" "$root/vmdedup/"
    install -m 755 "$images/host/vmdedup" "$root/usr/local/bin/"
    install -m 644 "$images/host/vmdedup-agent.service" "$root/etc/systemd/system/"
    systemctl --quiet --root="$root" enable vmdedup-agent
    systemctl --quiet --root="$root" mask getty@tty1 serial-getty@ttyS0 apt-daily.timer \
        apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer fstrim.timer
    systemctl --quiet --root="$root" set-default multi-user.target
    echo vmdedup-host >"$root/etc/hostname"
    echo 00000000000000000000000000000001 >"$root/etc/machine-id" # no first boot
    mke2fs -q -t ext4 -O '^has_journal,^metadata_csum' -d "$root" "$work/out/disk" 2400M >&2
    publish "$name" "$hash" "$work/out"
}

# What boots the host: the kernel of a series, and its initramfs.
build_host_kernel() { # series, or nothing
    local package hash work initrd name=host-kernel${1:+-$1}
    if [ -n "${1:-}" ]; then package=$(series_package "$1"); else package=$(kernel_package); fi
    hash=$(recipe_hash host "$package" "$(sha256sum </bin/busybox)")
    is_current "$name" "$hash" && { say "$name: up to date ($package)"; return; }
    fetch_kernel "$package"
    work=$(mktemp -d "$scratch/kernel.XXXX")
    initrd=$work/initrd
    mkdir -p "$initrd"/{bin,dev,disk,modules,proc} "$work/out"
    cp /bin/busybox "$initrd/bin/busybox"
    install -m 755 "$images/host/init" "$initrd/init"
    pack_initrd "$package" "$initrd" "$work/out"
    publish "$name" "$hash" "$work/out"
}

# What the container's image is built on where no registry is: configs/container/Containerfile.
build_base() {
    local codename=bookworm hash work
    command -v mmdebstrap >/dev/null || die "no mmdebstrap; run images/setup.sh"
    [ "$(id -u)" = 0 ] || die "base: be root"
    hash=$(recipe_hash common "$codename")
    is_current base "$hash" && { say "base: up to date ($codename)"; return; }
    say "base: installing a minimal $codename (half a minute)"
    work=$(mktemp -d "$scratch/base.XXXX")
    bootstrap "$codename" "$work/root" ca-certificates
    mkdir "$work/out"
    tar --directory "$work/root" --exclude './dev/*' --create --file "$work/out/root.tar" .
    publish base "$hash" "$work/out"
}

guest=${1:-all}
case $guest in
tiny | stock | bare | debian | host | host-[a-z]* | base | all) ;;
*) echo "usage: images/build.sh [tiny|stock|bare|debian|host [SERIES]|host-CODENAME|base|all]" >&2; exit 2 ;;
esac
mkdir -p "$out"
exec 9>"$cache/images.lock" # one build at a time
flock 9
rm -rf "$cache"/build.* # of a build that was killed
scratch=$(mktemp -d "$cache/build.XXXX")
trap 'rm -rf "$scratch"' EXIT
case $guest in
all) build_tiny; build_stock; build_bare ;;
host) build_host; build_host_kernel "${2:-}" ;;
host-*) build_host "${guest#host-}"; build_host_kernel ;;
*) "build_$guest" ;;
esac
