#!/usr/bin/env bash
# Build the wheel, install it into an empty environment by each extra alone, without a compiler, and use it: synthetic
# data, its cache, and a few steps of pre-training on it.
#
#   tests/wheel.sh            two environments, of 0.9 GB and 1.6 GB (torch for CPUs): some four minutes
#   tests/wheel.sh --borrow   the same with the packages of $PYTHON, those of the other half hidden: nothing but the
#                             wheel is installed; half the time
#
# PYTHON names the interpreter (python3). pip takes its own settings, such as PIP_EXTRA_INDEX_URL for a build of torch.
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# Without our sources, which Python would find in the working folder or on PYTHONPATH.
unset PYTHONPATH
export PYTHONSAFEPATH=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

"$PYTHON" -m pip wheel --quiet --no-deps --wheel-dir "$work" .
wheel=$(ls "$work"/*.whl)

# install EXTRA HIDDEN...: an environment with the wheel and what EXTRA asks for; none of HIDDEN can be imported in it.
install() {
  local extra=$1 environment=$work/$1 installed module
  shift
  if [ "${borrow:-}" ]; then
    "$PYTHON" -m venv --without-pip "$environment"
    installed=$("$environment/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    "$PYTHON" -m pip --python "$environment/bin/python" install --quiet --no-deps "$wheel"
    "$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > "$installed/borrowed.pth"
    for module; do
      echo "import sys; sys.modules['$module'] = None"
    done > "$installed/hidden.pth"
  else
    "$PYTHON" -m venv "$environment"
    "$environment/bin/pip" install --quiet --only-binary :all: --constraint constraints.txt "$wheel[$extra]"
  fi
  for module; do
    if "$environment/bin/python" -c "import $module" 2> /dev/null; then
      echo "$extra brings $module"
      exit 1
    fi
  done
}

[ "${1:-}" != --borrow ] || borrow=yes
install preprocess torch monai
install train dask distributed numba

cd "$work"
preprocess/bin/supercl phantom phantom --cases 3
preprocess/bin/supercl preprocess phantom phantom.zarr --workers 1
preprocess/bin/supercl verify phantom.zarr
train/bin/supercl verify phantom.zarr
train/bin/supercl split phantom.zarr split.json
train/bin/supercl pretrain phantom.zarr run --split split.json --preset demo --set steps=3 --set device=cpu
train/bin/supercl finetune phantom.zarr tuned --init run --split split.json --labelled 1 --preset demo \
  --set steps=3 --set device=cpu
train/bin/supercl evaluate tuned phantom.zarr
train/bin/supercl report run tuned -o report.html
[ "${borrow:-}" ] || for half in preprocess train; do
  $half/bin/supercl doctor
done
