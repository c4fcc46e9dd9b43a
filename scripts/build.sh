#!/usr/bin/env bash
# Installs what is missing and builds the library and the program in build/ (no tests): scripts/build.sh
set -euo pipefail
case ${1-} in
'') ;;
-h | --help) sed -n '2s/^# //p' "$0" && exit 0 ;;
*) echo "build.sh: unknown option $1: it takes none" >&2 && exit 2 ;;
esac
root=$(CDPATH= cd -- "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
"$root/scripts/setup.sh"
export CMAKE_GENERATOR=${CMAKE_GENERATOR:-Ninja} # where nobody has chosen: a build folder keeps its own
cmake -S "$root" -B "$root/build" -DCMAKE_BUILD_TYPE=Release
cmake --build "$root/build" --target longspan_program
