#!/bin/bash
# A pipeline step: merge all VMs now, keep the report, and fail if too little is saved.
#
#   gate.sh [PERCENT] [REPORT.json] [BASELINE.json]
#
# BASELINE.json is an earlier report; without that file only PERCENT counts. Exit codes are
# vmdedup's: 0 enough is saved, 1 failure (no daemon, no VM), 2 usage, 3 less is saved than
# PERCENT (default 30%) of what the VMs held before merging, or than in the baseline.
set -euo pipefail

percent=${1:-30%}
file=${2:-sharing-report.json}
baseline=${3:-}

options=(--json --fail-under "$percent")
if [ -n "$baseline" ] && [ -e "$baseline" ]; then
  options+=(--baseline "$baseline")
fi
vmdedup merge --timeout 120 > /dev/null
code=0
vmdedup report "${options[@]}" > "$file" || code=$?
echo "report: $file"
exit "$code"
