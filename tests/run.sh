#!/usr/bin/env bash
# All checks, on a machine where nothing is installed: lint, types, tests.
#   bash tests/run.sh              everything
#   bash tests/run.sh -e tests -- tests/unit      what is given goes to tox
# Needs root (or sudo) for the system packages and for the tests that trace VMs.
set -euo pipefail
cd "$(dirname "$0")/.."

bash images/setup.sh
bash images/build.sh all
if [ "$(id -u)" -eq 0 ]; then
  exec .venv/bin/tox run "$@"
fi
exec sudo --preserve-env .venv/bin/tox run "$@"
