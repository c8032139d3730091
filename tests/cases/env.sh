# Sourced by every run.sh: a scratch folder, the program under test, and a tiny trained detector that all cases share.
# SNIPER and PY name the program and its Python; by default those of .venv in the folder that the cases are started from.
export OMP_NUM_THREADS=1 NUMBA_NUM_THREADS=1
PY=${PY:-$START/.venv/bin/python}
SNIPER=${SNIPER:-$START/.venv/bin/sniper}
CASES=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
SCRATCH=${SCRATCH:-${TMPDIR:-/tmp}/sniper-cases}
SHARED=$SCRATCH/shared
W=$SCRATCH/$(basename "$PWD"); rm -rf "$W"; mkdir -p "$W"; cd "$W"
export PYTHONPATH="$CASES${PYTHONPATH:+:$PYTHONPATH}" SHARED
tiny() {
  [ -f "$SHARED/run/config.yaml" ] && return
  "$PY" -c "from common import world; world('$SHARED')" && cp "$CASES/tiny.yaml" "$SHARED/" &&
    "$SNIPER" train "$SHARED/tiny.yaml" --run "$SHARED/run" >"$SCRATCH/train.log" 2>&1
}
fail() { echo "FAIL: $*"; exit 1; }
no_traceback() { grep -q Traceback "$1" && { tail -1 "$1"; fail "traceback"; }; true; }
