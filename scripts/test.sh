#!/usr/bin/env bash
# Builds everything and runs all tests: installs what is missing, configures, compiles with warnings as errors, ctest.
#
#   scripts/test.sh                 in build/, optimised
#   scripts/test.sh --sanitize      in build-sanitize/, with AddressSanitizer, LeakSanitizer and UBSan
#   scripts/test.sh -- -R golden    what follows -- goes to ctest
set -euo pipefail
root=$(CDPATH= cd -- "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

build=$root/build sanitize="" type=Release
while [ $# -gt 0 ]; do
  case $1 in
  --sanitize) build=$root/build-sanitize sanitize=address,undefined type=Debug ;;
  --) shift && break ;;
  -h | --help) sed -n '2,6s/^# \{0,1\}//p' "$0" && exit 0 ;;
  *) echo "test.sh: unknown option $1: use --sanitize, or -- before what ctest shall get" >&2 && exit 2 ;;
  esac
  shift
done

"$root/scripts/setup.sh"
export CMAKE_GENERATOR=${CMAKE_GENERATOR:-Ninja} # where nobody has chosen: a build folder keeps its own
cmake -S "$root" -B "$build" -DCMAKE_BUILD_TYPE=$type -DLONGSPAN_WERROR=ON -DLONGSPAN_SANITIZE="$sanitize"
cmake --build "$build"

if [ -n "$sanitize" ]; then
  # Open MPI and its transports keep memory until exit (whole call stacks are needed to tell); ours is still reported.
  # The leak checker crashes on some libraries' thread-local memory: without it what only that points to is a leak, too.
  export ASAN_OPTIONS=${ASAN_OPTIONS:-detect_leaks=1:fast_unwind_on_malloc=0:allocator_may_return_null=1}
  export LSAN_OPTIONS=${LSAN_OPTIONS:-suppressions=$root/tests/lsan.supp:print_suppressions=0:use_tls=0}
  export UBSAN_OPTIONS=${UBSAN_OPTIONS:-print_stacktrace=1}
fi
cd "$build"
ctest --output-on-failure --no-tests=error -j $(($(nproc) + 4)) "$@" # more than cores: some tests mostly wait
