#!/usr/bin/env bash
# Everything that needs a GPU, in one go and under ten minutes: CUDA tests, a latency table, CUDA graphs against eager
# computing, separate models, the mechanism, ensembles, the server.
# Whoever gets a GPU runs this first. It installs nothing: where httptools (the replay's parser) is missing, the part over
# HTTP is left out and says so. The images lie beside the project, or where DATA and TRACE say.
#
#   OUT=out scripts/gpu_check.sh
#   PYTHON=python3.12 DATA=.carry/cifar10_jpeg.npz TRACE=.carry/twitter_normal.txt.gz scripts/gpu_check.sh
#
# Ends within ALL_S seconds (560), whatever hangs: parts come in the order of their worth, and the last ones get what time
# is left. Prints a short table last. That, the new latency tables and, packed, all logs and reports are left in OUT: a
# handful of files, as many as can be brought back from a machine that is lent.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
OUT=${OUT:-out}
PROFILE=${PROFILE:-profiles/cifar10}
DATA=${DATA:-../shared/data/cifar10_jpeg.npz}
TRACE=${TRACE:-../shared/data/traces/twitter_normal.txt.gz}
ALL_S=${ALL_S:-560}
LAST_S=15 # for what does not end when it is told to, and for packing
ZOO=profiles/cifar10-zoo
export PYTHONUNBUFFERED=1 # what is cut off has said all until then
mkdir -p "$OUT"
declare -a TABLE
failed=0

row() { # name, what came of it, seconds, more
  TABLE+=("$(printf '%-10s %-8s %4ds  %s' "$1" "$2" "$3" "${4:0:300}")")
}

part() { # name, seconds allowed, command...: runs it, keeps its output, notes how it went
  local name=$1 limit=$2 left=$((ALL_S - LAST_S - SECONDS)) began=$SECONDS result=ok code
  shift 2
  if [ "$left" -le 0 ]; then
    row "$name" skipped 0 "no time left of $ALL_S s"
    return
  fi
  echo "== $name: $*"
  timeout -k 5 $((left < limit ? left : limit)) "$@" >"$OUT/$name.log" 2>&1
  code=$?
  case $code in
    0) ;;
    124 | 137) result="CUT OFF" failed=1 ;;
    *) result=FAILED failed=1 ;;
  esac
  row "$name" "$result" $((SECONDS - began)) "$(tail -n 1 "$OUT/$name.log")"
  tail -n 15 "$OUT/$name.log"
}

needs() { # name, what must be there...: whether all of it is; else notes that the part is left out
  local name=$1 each
  shift
  for each in "$@"; do
    if [ ! -e "$each" ]; then
      row "$name" "left out" 0 "$each is not there"
      return 1
    fi
  done
}

new_table() { # folder, target: the latency table that was measured there just now, if any
  find "$1" -maxdepth 1 -name 'latency-cuda-*.json' -newer "$OUT/began" -exec cp {} "$2" \; 2>/dev/null
}

pack() { # archive, what to put there instead...
  tar -czf "$OUT/$1" -C "$OUT" "${@:2}" && (cd "$OUT" && rm -rf -- "${@:2}")
}

finish() { # whatever happened
  local logs=("$OUT"/*.log)
  new_table "$PROFILE" "$OUT"
  new_table "$ZOO" "$OUT/zoo-latency.json"
  find "$PROFILE" -maxdepth 1 -name choices.json -newer "$OUT/began" -exec cp {} "$OUT" \;
  rm -f "$OUT/began"
  [ -d "$OUT/serving" ] && pack serving.tar.gz serving
  [ -e "${logs[0]}" ] && pack logs.tar.gz "${logs[@]##*/}"
  {
    echo "part       result   time  last line of its log (logs.tar.gz: PART.log)"
    printf '%s\n' "${TABLE[@]}"
  } >"$OUT/table.txt"
  echo
  cat "$OUT/table.txt"
  exit "$failed"
}

if ! timeout -k 5 60 "$PYTHON" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
  echo "gpu_check.sh: no CUDA device is visible to $PYTHON's torch" >&2
  exit 2
fi
touch "$OUT/began"
trap finish EXIT
timeout -k 5 60 "$PYTHON" -c 'import torch; print("GPU:", torch.cuda.get_device_name(), "torch", torch.__version__, "CUDA", torch.version.cuda)'

# The plugins that pyproject.toml configures may be missing there; the CUDA tests need none of them.
part tests 200 "$PYTHON" -m pytest -c /dev/null --rootdir . -p no:cacheprovider -v --durations=5 -m gpu \
  tests/test_engine.py tests/test_inputbatches.py
part profile 120 "$PYTHON" scripts/profile_supernet.py --profile "$PROFILE" --latency-only --device cuda --rounds 40
part graphs 60 "$PYTHON" scripts/bench_graphs.py --profile "$PROFILE" --device cuda
part bfloat16 60 "$PYTHON" scripts/profile_supernet.py --profile "$PROFILE" --latency-only --device cuda --rounds 20 \
  --dtype bfloat16
needs float16 "$DATA" &&
  part float16 90 "$PYTHON" scripts/profile_supernet.py --profile "$PROFILE" --data "$DATA" --device cuda --rounds 20 \
    --dtype float16 # measures accuracies, too, and writes them into choices.json
needs zoo "$ZOO/choices.json" &&
  part zoo 60 "$PYTHON" scripts/profile_supernet.py --profile "$ZOO" --latency-only --device cuda --rounds 20
part mechanism 60 "$PYTHON" scripts/bench_supernet.py --profile "$PROFILE" --device cuda
needs ensemble "$ZOO/choices.json" "$DATA" &&
  part ensemble 60 "$PYTHON" scripts/bench_ensemble.py --profile "$ZOO" --data "$DATA" --device cuda
if ! timeout 5 "$PYTHON" -c 'import httptools' 2>/dev/null; then
  row serving "left out" 0 "httptools is not there"
elif needs serving "$DATA" "$TRACE"; then
  # A capacity that is given rather than searched, which would take minutes: 1,200 queries/s.
  part serving 120 "$PYTHON" scripts/bench_serving.py --profile "$PROFILE" --data "$DATA" --trace "$TRACE" \
    --capacity 2000 --loads 0.6 --policies halfslo fixed:largest --duration 8 --slo-ms 36 --out "$OUT/serving" \
    --flags --device cuda # and the default memory budget, with which the latencies above were measured
fi
exit "$failed"
