#!/usr/bin/env bash
# Fetches the QEMU of this Debian release's backports beside the installed one.
#
#   images/qemu.sh
#
# Leaves it unpacked in .cache/qemu/, unless it is there already, and prints the folder
# whose qemu-system-x86_64 runs it: put that first in PATH. Needs no root. Nothing is
# installed: apt works on lists, caches and sources of a folder of its own, which are
# derived from this machine's, and only downloads. Steps are told on stderr; where
# backports cannot be had, the last line says why and the exit code is 1.
set -euo pipefail

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cache=$repository/.cache
out=$cache/qemu
failure=$out.failure
program=qemu-system-x86_64
. "$repository/images/apt.sh"

say() { printf 'qemu: %s\n' "$*" >&2; }

# A failure is remembered for ten minutes: many tests ask at once.
die() {
    say "$*" 2>&1 | tee "$failure" >&2
    exit 1
}

recipe() { cat "$repository"/images/{qemu,apt}.sh | sha256sum | cut -c 1-16; }

# It runs, and with modules of its own: it takes those of the installed QEMU for its own
# where it has none of a name, and ends.
runs() { # folder
    "$1/bin/$program" -device help >/dev/null 2>&1
}

# QEMU with its modules, and whatever they need in another version than is installed.
download() {
    local package packages=(qemu-system-x86)
    packages+=($(apt_here apt-cache pkgnames qemu-system-modules-))
    for package in qemu-system-gui qemu-block-extra; do
        dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q ' installed$' &&
            packages+=("$package")
    done
    apt_here apt-get -y --no-install-recommends --download-only \
        -t "$release-backports" install "${packages[@]}" >&2
}

candidate() {
    apt_here apt-cache -t "$release-backports" policy qemu-system-x86 |
        sed -n 's/^ *Candidate: //p' || true
}

# The program itself with its own ROMs, modules and libraries.
write_wrapper() {
    mkdir "$scratch/root/bin"
    cat >"$scratch/root/bin/$program" <<'WRAPPER'
#!/bin/sh
# Runs the QEMU unpacked beside this folder with its own ROMs, modules and libraries.
own=$(dirname "$(dirname "$(readlink -f "$0")")")/usr
export QEMU_MODULE_DIR="$own/lib/x86_64-linux-gnu/qemu"
export LD_LIBRARY_PATH="$own/lib/x86_64-linux-gnu${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
exec "$own/bin/qemu-system-x86_64" -L "$own/share/qemu" -L "$own/share/seabios" "$@"
WRAPPER
    chmod 755 "$scratch/root/bin/$program"
}

fetch() {
    local version package
    prepare_apt "$release-backports"
    version=$(candidate)
    case $version in
    *~bpo*) ;;
    *) die "$release-backports offers no QEMU, or cannot be reached from here" ;;
    esac
    say "downloading QEMU ${version#*:} from $release-backports (16 MB)"
    # Package lists that have grown old name files which are no longer there.
    download || { apt_here apt-get update >&2 && download; } ||
        die "apt cannot download QEMU from $release-backports"
    compgen -G "$scratch/cache/archives/*.deb" >/dev/null ||
        die "the installed QEMU is that of $release-backports already"
    for package in "$scratch"/cache/archives/*.deb; do
        dpkg-deb -x "$package" "$scratch/root"
    done
    [ -x "$scratch/root/usr/bin/$program" ] || die "the downloaded packages have no $program"
    rm -rf "$scratch"/root/usr/share/{doc,man,icons}
    write_wrapper
    runs "$scratch/root" || die "QEMU $version does not run beside the installed one"
    recipe >"$scratch/root/recipe"
    chmod -R a+rX "$scratch/root"
    [ ! -e "$out" ] || mv -T "$out" "$scratch/old"
    mv -T "$scratch/root" "$out"
    say "$("$out/bin/$program" --version | head -n 1)"
}

mkdir -p "$cache"
exec 9>"$cache/qemu.lock" # one at a time
flock 9
if [ "$(cat "$out/recipe" 2>/dev/null)" != "$(recipe)" ] || ! runs "$out"; then
    if [ -n "$(find "$failure" -mmin -10 2>/dev/null)" ]; then
        cat "$failure" >&2
        exit 1
    fi
    command -v apt-get >/dev/null || die "no apt-get here: not a Debian"
    rm -rf "$cache"/qemu.fetch.* # of one that was killed
    scratch=$(mktemp -d "$cache/qemu.fetch.XXXX")
    trap 'rm -rf "$scratch"' EXIT
    fetch
    rm -f "$failure"
fi
echo "$out/bin"
