#!/usr/bin/env bash
# Run the layers of the tests: all, or the named ones.
#
#   tests/run.sh [--verbose] [--kubeconfig FILE] [unit integration chart slurm kube e2e]
#
# Dependencies of the layers are installed first. slurm, kube and e2e run in a separate lab (see docs/development/lab.md), which needs root
# on Debian. Tests with a missing dependency are skipped; the last lines give their number and the reasons. With
# ISTHMUS_REQUIRE_ALL=1 they fail. With --kubeconfig, kube and e2e use that cluster instead; see docs/development/workflow.md for what it must have.
set -uo pipefail
cd "$(dirname "$0")/.." || exit
python=$PWD/.venv/bin/python
lab_dir=${ISTHMUS_TEST_LAB:-/var/tmp/isthmus-test-lab}
images=${IMAGES_DIR:-/var/tmp/isthmus-images}
kubeconfig=
options=()
layers=()
while [ $# -gt 0 ]; do
  case $1 in
    --verbose) options+=(-s -v) ;;
    --kubeconfig) kubeconfig=$(realpath "$2"); shift ;;
    *) layers+=("$1") ;;
  esac
  shift
done
[ ${#layers[@]} -gt 0 ] || layers=(unit integration chart slurm kube e2e)
status=0
beside=
up=
ISTHMUS_SKIPPED=$(mktemp) # tests/conftest.py adds a line for each skipped test
export ISTHMUS_SKIPPED

clean_up() {
  [ -z "$up" ] || lab down
  rm -f "$ISTHMUS_SKIPPED"
}
trap clean_up EXIT

wanted() {
  local layer
  for layer in "${layers[@]}"; do [ "$layer" = "$1" ] && return 0; done
  return 1
}

run() { # run COMMAND…: record a failure; the other layers still run
  echo "+ $*"
  "$@" || status=1
}

in_lab() { # in_lab FOLDER…: run these tests in the running lab
  ISTHMUS_IMAGES=$images lab exec -- "$python" -m pytest "${options[@]}" "$@"
}

newer_slurm() { # run the tests of all adapters, including pyslurm, with a newer Slurm
  "$python" -m lab newer-slurm -- /opt/isthmus/bin/python -m pytest "${options[@]}" tests/slurm/test_adapters.py
}

lab() { # lab VERB…: run this verb in the lab of the tests
  local verb=$1
  shift
  "$python" -m lab "$verb" --dir "$lab_dir" "$@"
}

paths() { # paths LAYER…: print the folders of the wanted layers
  local layer
  for layer in "$@"; do ! wanted "$layer" || echo "tests/$layer"; done
}

sum_up() { # print the number of skipped tests of all layers, and the reasons
  local count
  count=$(wc -l <"$ISTHMUS_SKIPPED")
  if [ "$count" = 0 ]; then
    echo "No test was skipped."
  else
    echo "Skipped: $count tests (or files of tests), because:"
    sort "$ISTHMUS_SKIPPED" | uniq -c | sort -rn
  fi
}

mapfile -t here < <(paths unit integration chart)
mapfile -t there < <(paths slurm kube e2e)

is_debian_12() {
  # shellcheck source=/dev/null
  [ -r /etc/os-release ] && (. /etc/os-release && [ "${ID:-} ${VERSION_ID:-}" = "debian 12" ])
}

in_a_lab=
if [ ${#there[@]} -gt 0 ] && [ -z "$kubeconfig" ]; then
  if [ "$(id -u)" = 0 ] && is_debian_12; then
    in_a_lab=1
  else
    echo "The lab needs root on Debian 12; without it, its layers are skipped."
  fi
fi
ready=1
if [ -n "$in_a_lab" ]; then
  "$python" -m lab install || ready=
else
  "$python" -m lab install --only tools || echo "Tests that need a missing program are skipped."
fi

if [ ${#here[@]} -gt 0 ]; then
  run "$python" -m pytest -n auto --dist loadfile "${options[@]}" "${here[@]}"
fi

if [ ${#there[@]} -gt 0 ] && [ -n "$kubeconfig" ]; then
  KUBECONFIG=$kubeconfig run "$python" -m pytest "${options[@]}" "${there[@]}"
elif [ ${#there[@]} -gt 0 ] && [ -z "$in_a_lab" ]; then
  run "$python" -m pytest "${options[@]}" "${there[@]}"
elif [ ${#there[@]} -gt 0 ]; then
  if [ -n "$ready" ] && wanted e2e; then
    "$python" images/build --output "$images" --rootfs "$images/rootfs" operator runtime || ready=
  fi
  [ -n "$ready" ] && { lab up || ready=; }
  if [ -n "$ready" ]; then
    up=1
    # Most of these tests wait and are independent: Slurm's tests run in parallel with those of Kubernetes, three at a
    # time. The tests that kill the cluster's daemons run afterwards.
    alone=()
    if wanted slurm && wanted kube; then
      { in_lab tests/slurm; old=$?; newer_slurm && [ "$old" = 0 ]; } >"$lab_dir/slurm-tests.log" 2>&1 &
      beside=$!
    elif wanted slurm; then
      alone+=(tests/slurm)
      run newer_slurm
    fi
    if wanted kube; then
      run in_lab -n 3 --dist worksteal tests/kube --ignore tests/kube/test_disruptions.py
      lab exec -- kubectl delete --ignore-not-found --timeout=240s -f crds || status=1
      alone+=(tests/kube/test_disruptions.py)
    fi
    if [ -n "$beside" ]; then
      echo "+ in_lab tests/slurm (in parallel)"
      wait "$beside" || status=1
      cat "$lab_dir/slurm-tests.log"
    fi
    ! wanted e2e || alone+=(tests/e2e)
    [ ${#alone[@]} -eq 0 ] || run in_lab "${alone[@]}"
  else
    echo "tests/run.sh: the lab did not come up; see above"
    status=1
  fi
fi
sum_up
exit $status
