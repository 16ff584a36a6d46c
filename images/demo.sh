#!/usr/bin/env bash
# Shows vmdedup at work on this machine: four VMs that check their own memory,
# merged live, reported, proved unharmed, unmerged. About three minutes the first
# time. As root or with sudo; leaves nothing running.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash images/setup.sh
bash images/build.sh all
if [ "$(id -u)" -eq 0 ]; then
    exec .venv/bin/python images/demo.py
fi
exec sudo .venv/bin/python images/demo.py
