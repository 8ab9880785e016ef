#!/usr/bin/env bash
# Everything that needs a GPU, in one go and under ten minutes: CUDA tests, a latency table, CUDA graphs against eager
# computing, the mechanism, the server.
# Whoever gets a GPU runs this first. It installs nothing: where httptools (the replay's parser) is missing, the part over
# HTTP is left out and says so. The images lie beside the project, or where DATA and TRACE say.
#
#   OUT=out scripts/gpu_check.sh
#   PYTHON=python3.12 DATA=.carry/cifar10_jpeg.npz TRACE=.carry/twitter_normal.txt.gz scripts/gpu_check.sh
#
# Prints a short table last; reports, plots and the new latency table are left in OUT.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
OUT=${OUT:-out}
PROFILE=${PROFILE:-profiles/cifar10}
DATA=${DATA:-../shared/data/cifar10_jpeg.npz}
TRACE=${TRACE:-../shared/data/traces/twitter_normal.txt.gz}
mkdir -p "$OUT"
declare -a TABLE

part() {  # name, seconds allowed, command...: runs it, keeps its output, notes how it went
  local name=$1 limit=$2 began=$SECONDS
  shift 2
  echo "== $name: $*"
  if timeout "$limit" "$@" >"$OUT/$name.log" 2>&1; then
    TABLE+=("$(printf '%-10s ok      %4ds  %s' "$name" $((SECONDS - began)) "$(tail -n 1 "$OUT/$name.log" | cut -c 1-300)")")
  else
    TABLE+=("$(printf '%-10s FAILED  %4ds  %s' "$name" $((SECONDS - began)) "$(tail -n 1 "$OUT/$name.log" | cut -c 1-300)")")
    failed=1
  fi
  tail -n 15 "$OUT/$name.log"
}

failed=0
if ! "$PYTHON" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
  echo "gpu_check.sh: no CUDA device is visible to $PYTHON's torch" >&2
  exit 2
fi
"$PYTHON" -c 'import torch; print("GPU:", torch.cuda.get_device_name(), "torch", torch.__version__, "CUDA", torch.version.cuda)'

# The plugins that pyproject.toml configures may be missing there; the CUDA tests need none of them.
part tests 150 "$PYTHON" -m pytest -c /dev/null --rootdir . -p no:cacheprovider -q -m gpu tests/test_engine.py
part profile 120 "$PYTHON" scripts/profile_supernet.py --profile "$PROFILE" --latency-only --device cuda --rounds 40
part graphs 60 "$PYTHON" scripts/bench_graphs.py --profile "$PROFILE" --device cuda
part mechanism 60 "$PYTHON" scripts/bench_supernet.py --profile "$PROFILE"
if [ -e "$DATA" ] && [ -e profiles/cifar10-zoo/choices.json ]; then
  part zoo 60 "$PYTHON" scripts/profile_supernet.py --profile profiles/cifar10-zoo --latency-only --device cuda --rounds 20
  part ensemble 60 "$PYTHON" scripts/bench_ensemble.py --profile profiles/cifar10-zoo --data "$DATA" --device cuda
fi
if "$PYTHON" -c 'import httptools' 2>/dev/null && [ -e "$DATA" ] && [ -e "$TRACE" ]; then
  part serving 210 "$PYTHON" scripts/bench_serving.py --profile "$PROFILE" --data "$DATA" --trace "$TRACE" \
    --loads 0.3 0.6 --policies halfslo fixed:largest --first-rate 1000 --duration 20 --slo-ms 36 --out "$OUT/serving" \
    --flags --device cuda  # and the default memory budget, with which the latencies above were measured
else
  TABLE+=("serving    left out: httptools, $DATA or $TRACE is not there")
fi
cp "$PROFILE"/latency-cuda-*.json "$OUT"/ 2>/dev/null

echo
echo "part       result  time  last line of its log ($OUT/PART.log)"
printf '%s\n' "${TABLE[@]}"
exit "$failed"
