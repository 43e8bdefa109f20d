#!/bin/sh
# `pipeline` in a container: what it commonly lacks is said first; exec comes last, so that signals reach the command.
set -u

# A user without an entry in passwd, or a root that is read-only: libraries want a home for their caches.
if [ ! -w "${HOME:-/}" ]; then
    home=$(mktemp -d 2>/dev/null) && export HOME="$home"
fi
export TORCHINDUCTOR_CACHE_DIR="${TORCHINDUCTOR_CACHE_DIR:-$HOME/.cache/torchinductor}"

# Left behind by a start that was killed.
[ -z "${PIPELINE_HEARTBEAT:-}" ] || rm -f "$PIPELINE_HEARTBEAT" 2>/dev/null

if [ "${1:-}" = train ] && [ -z "${PIPELINE_NO_HINTS:-}" ]; then
    (shift && exec python -m pipeline.doctor.container "$@") || true
fi
exec pipeline "$@"
