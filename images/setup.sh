#!/usr/bin/env bash
# Prepares a Debian 12 machine: the system packages, then .venv with the project.
#
#   images/setup.sh
#
# As root or with sudo. Installs only what is missing and is quick when nothing
# is. Steps are told on stderr.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

say() { printf 'setup: %s\n' "$*" >&2; }
die() { say "failed: $*"; exit 1; }

packages=(
    qemu-system-x86 qemu-utils      # the VMs
    busybox-static cpio xz-utils    # the tiny guest's initramfs
    gcc gcc-multilib libc6-dev      # the guests' workers
    mmdebstrap e2fsprogs            # the Debian guest
    libvirt-daemon libvirt-daemon-driver-qemu libvirt-clients # domains to test with
    libvirt-dev pkg-config          # its Python binding is compiled
    chromium                        # the pages are looked at
    curl                            # the examples of docs/api.md
    openssh-client                  # other hosts: --host ssh://…
    spin                            # the model of the merge protocol is checked
    groff-base mandoc               # the man pages are read
    systemd procps                  # they check the files in configs/
    python3 python3-venv python3-dev # the project
)

# Debian starts these as services, which nobody has asked for: only where nothing starts services.
[ -d /run/systemd/system ] || packages+=(openssh-server nginx)

as_root() {
    if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi
}

install_packages() {
    local missing=() package
    for package in "${packages[@]}"; do
        dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q ' installed$' ||
            missing+=("$package")
    done
    if [ ${#missing[@]} -gt 0 ]; then
        [ "$(id -u)" = 0 ] || command -v sudo >/dev/null || die "run it as root, or install sudo"
        say "installing ${missing[*]}"
        as_root apt-get -qq update >&2
        as_root env DEBIAN_FRONTEND=noninteractive \
            apt-get -qq install -y --no-install-recommends "${missing[@]}" >&2
    fi
    # The guest's kernel comes from apt too (images/build.sh).
    if [ -z "$(apt-cache pkgnames linux-image- | grep -m 1 -e '-cloud-amd64$' || true)" ]; then
        say "reading apt's package lists"
        as_root apt-get -qq update >&2
    fi
    say "system packages are there"
}

# The first Python of at least 3.11 that can make a venv.
find_python() {
    local python
    for python in python3 /usr/bin/python3; do
        if "$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' \
            2>/dev/null; then
            echo "$python"
            return
        fi
    done
    die "no Python 3.11 or newer with venv"
}

# Made anew when pyproject.toml, what is compiled, or the place of the repository changes.
make_venv() {
    local stamp python
    stamp=$(printf '%s' "$root" | cat - "$root/pyproject.toml" "$root"/vmdedup/remap/*.c |
        sha256sum | cut -d ' ' -f 1)
    if [ "$(cat "$root/.venv/.vmdedup-setup" 2>/dev/null)" = "$stamp" ] &&
        "$root/.venv/bin/python" -c 'import vmdedup.remap._gates' 2>/dev/null; then
        say ".venv is up to date"
        return
    fi
    say "making .venv and installing the project into it (a minute)"
    if ! "$root/.venv/bin/python" -c 'import pip' 2>/dev/null; then
        python=$(find_python)
        "$python" -m venv --clear "$root/.venv"
    fi
    "$root/.venv/bin/python" -m pip install --quiet --disable-pip-version-check \
        -e "$root[dev]" >&2
    echo "$stamp" >"$root/.venv/.vmdedup-setup"
    say ".venv is ready"
}

install_packages
make_venv
