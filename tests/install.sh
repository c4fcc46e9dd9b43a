#!/usr/bin/env bash
# The library as a stranger meets it: installed aside, found by CMake and by pkg-config, one example built and run.
#   install.sh BUILD_DIR SOURCE_DIR
set -euo pipefail
build=$1 source=$2
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
run="mpirun --oversubscribe --bind-to none"

cmake --install "$build" --prefix "$scratch/prefix" >"$scratch/install.log"
cmake -S "$source/examples" -B "$scratch/example" -DCMAKE_PREFIX_PATH="$scratch/prefix" >"$scratch/configure.log"
cmake --build "$scratch/example" >"$scratch/build.log"

library=$(find "$scratch/prefix" -name 'liblongspan.so.*' -type l)
soname=$(objdump -p "$library" | awk '/SONAME/ {print $2}')
[ "$soname" = "$(basename "$library")" ] || { echo "SONAME $soname is not $(basename "$library")"; exit 1; }
if objdump -p "$library" | grep -E 'NEEDED.*(hdf5|yaml|jansson|xxhash)'; then
  echo "liblongspan links what belongs to the trainer alone" && exit 1
fi

one=$($run -n 1 "$scratch/example/one_attention")
three=$($run -n 3 "$scratch/example/one_attention")
echo "$one"
echo "$three"
[ -n "$one" ] && [ "${one#*, }" = "${three#*, }" ] || { echo "the example differs between 1 and 3 ranks"; exit 1; }

export PKG_CONFIG_PATH=$(dirname "$(find "$scratch/prefix" -name longspan.pc)")
read -r -a flags <<<"$(pkg-config --cflags --libs longspan)"
cc -std=c11 ${CFLAGS-} "$source/examples/one_attention.c" -o "$scratch/by_pkg_config" "${flags[@]}" -Wl,-rpath,"$(dirname "$library")"
by_pkg_config=$($run -n 2 "$scratch/by_pkg_config")
echo "$by_pkg_config"
[ "${one#*, }" = "${by_pkg_config#*, }" ]

# the installed program runs from where it is
"$scratch/prefix/bin/longspan" --version
