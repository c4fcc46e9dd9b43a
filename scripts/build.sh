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
generator=(-G Ninja)
[ ! -f "$root/build/CMakeCache.txt" ] || generator=() # somebody has chosen
cmake -S "$root" -B "$root/build" "${generator[@]}" -DCMAKE_BUILD_TYPE=Release
cmake --build "$root/build" --target longspan_program
