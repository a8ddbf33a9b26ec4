#!/usr/bin/env bash
# Submit a chain of recipes to a running Ray cluster as a job (`ray job submit`), and follow its log.
#
#   STORAGE=/mnt/shared launch/submit.sh recipes/o365_focal_h.yaml recipes/richsem_focal_h.yaml [section.key=value ...]
#
# What is uploaded is the code of this checkout and the recipes, 2 MB; Ray refuses 100 MB, and data never belong in it.
# The cluster's nodes need longtail's dependencies (launch/Dockerfile) and a folder that all of them share:
#
#   STORAGE   that folder, an absolute path on the cluster; the job runs there, so relative paths of recipes (data.root, output)
#             begin there, and checkpoints outlive the job
#   RAY_API_SERVER_ADDRESS   the job server (http://127.0.0.1:8265): it listens on the head's loopback address only, so bring it
#             here by `ray dashboard launch/cluster.yaml`, `ssh -L 8265:127.0.0.1:8265 HEAD` or `kubectl port-forward`
#   RAY_AUTH_TOKEN_PATH, or RAY_AUTH_TOKEN   the cluster's token; by default ~/.ray/auth_token
#   VERB      run (default), prepare, train, evaluate or check
#
# Options of `ray job submit`, such as --no-wait or --submission-id NAME, stand before the first recipe. Stopping it saves a
# checkpoint where the cluster gives jobs time for it (RAY_JOB_STOP_WAIT_TIME_S=300 where its head is started; Ray's default is
# 3 s), and the same command goes on:
#
#   ray job stop SUBMISSION_ID
set -euo pipefail

usage() {
    sed -n '2,21p' "$0" >&2
    exit 78
}

root=$(cd "$(dirname "$0")/.." && pwd)
if [ -x "$root/.venv/bin/ray" ]; then
    PATH="$root/.venv/bin:$PATH"
fi
stage=$(mktemp -d)
trap 'rm -rf "$stage"' EXIT
mkdir "$stage/recipes"

options=() words=() recipes=0
while [ $# -gt 0 ]; do
    case "$1" in
        --submission-id | --metadata-json | --entrypoint-num-cpus | --entrypoint-memory) options+=("$1" "${2:?}") && shift ;;
        --*) options+=("$1") ;;
        *=*) words+=("$(printf %q "$1")") ;;
        *)
            [ -f "$1" ] || {
                echo "no recipe at $1. If it is the value of an option: --submission-id, --metadata-json," \
                    "--entrypoint-num-cpus and --entrypoint-memory take one; give that of any other as --option=VALUE" >&2
                exit 78
            }
            recipes=$((recipes + 1))
            name="recipes/${recipes}_$(basename "$1")"
            cp "$1" "$stage/$name"
            words+=("\"\$code\"/$(printf %q "$name")")
            ;;
    esac
    shift
done
[ "$recipes" -gt 0 ] || usage
case "${STORAGE:-}" in
    /*) ;;
    *) echo "STORAGE has to be the absolute path of a folder that all nodes share, not '${STORAGE:-}'" >&2 && exit 78 ;;
esac

tar -C "$root" --exclude=__pycache__ -c pipeline | tar -C "$stage" -x
# Arguments are quoted once, here: `ray job submit` joins words by rules of its own.
cat >"$stage/start.sh" <<START
set -e
code=\$PWD
cd $(printf %q "$STORAGE")
export PYTHONPATH="\$code\${PYTHONPATH:+:\$PYTHONPATH}"
exec python -P -m pipeline $(printf %q "${VERB:-run}") ${words[*]}
START

export RAY_AUTH_MODE="${RAY_AUTH_MODE:-token}"
ray job submit --address "${RAY_API_SERVER_ADDRESS:-http://127.0.0.1:8265}" --working-dir "$stage" \
    ${options[@]+"${options[@]}"} -- bash start.sh
