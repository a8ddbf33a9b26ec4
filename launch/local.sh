#!/usr/bin/env bash
# Run a chain of recipes on this machine: Ray is started on loopback, used, and stopped.
#
#   launch/local.sh recipes/quickstart_pretrain.yaml recipes/quickstart.yaml [section.key=value ...]
#
# The same command continues a run that was stopped (exit code 75) or killed. Without Ray, for debugging or where Ray is not
# wanted, train under torchrun once the shards are prepared:
#
#   longtail prepare RECIPE
#   torchrun --standalone --nproc-per-node 2 -m pipeline train RECIPE
set -euo pipefail
if [ $# -eq 0 ]; then
    sed -n '2,11p' "$0" >&2
    exit 78
fi
cd "$(dirname "$0")/.."
if [ -x .venv/bin/longtail ]; then
    exec .venv/bin/longtail run "$@"
fi
exec longtail run "$@"
