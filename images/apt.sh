# apt on lists, caches and sources of a folder of its own, which are derived from this
# machine's: nothing is installed, and nothing of the machine's changes. To be sourced.
#
# The script that sources it has `$scratch`, a folder to work in, and `die`.
release=$(. /etc/os-release && echo "${VERSION_CODENAME:-bookworm}")
archive_keys=/usr/share/keyrings/debian-archive-keyring.gpg

# apt with state of its own below $scratch and this machine's configuration.
apt_here() { # program arguments...
    local tool=$1
    shift
    "$tool" -qq -o APT::Sandbox::User=root -o Debug::NoLocking=1 \
        -o Acquire::Retries=1 -o Acquire::http::Timeout=20 -o Acquire::https::Timeout=20 \
        -o Dir::State::lists="$scratch/lists" -o Dir::Cache="$scratch/cache" \
        -o Dir::Etc::sourceparts="$scratch/sources" "$@"
}

# The mirror of the release itself, as apt is configured here.
mirror() {
    apt_here apt-get indextargets --format '$(ORIGIN)|$(RELEASE)|$(REPO_URI)' \
        'Created-By: Packages' 'Component: main' |
        sed -n "s/^Debian|$release|//p" | head -n 1
}

# This machine's lists and sources, and those of further suites of its mirror.
prepare_apt() { # suites...
    local found keys="" suite
    mkdir -p "$scratch"/{lists,cache/archives,sources}/partial "$scratch/root"
    rmdir "$scratch/sources/partial"
    cp /etc/apt/sources.list.d/*.{list,sources} "$scratch/sources/" 2>/dev/null || true
    cp /var/lib/apt/lists/*_* "$scratch/lists/" 2>/dev/null || true
    found=$(mirror)
    if [ -z "$found" ]; then # a machine whose lists were never read
        apt_here apt-get update >&2 || true
        found=$(mirror)
    fi
    [ -n "$found" ] || die "apt knows no Debian mirror for $release"
    [ ! -e "$archive_keys" ] || keys="[signed-by=$archive_keys] "
    for suite in "$@"; do
        if ! apt_here apt-get indextargets --format '$(RELEASE)' | grep -qx "$suite"; then
            echo "deb $keys$found $suite main" >"$scratch/sources/$suite.list"
            apt_here apt-get -o Dir::Etc::sourcelist="$scratch/sources/$suite.list" \
                -o Dir::Etc::sourceparts=- -o APT::Get::List-Cleanup=0 update >&2 || true
        fi
    done
}
