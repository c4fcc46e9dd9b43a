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
if nm -D --defined-only "$library" | grep ' [A-Z] ' | awk '{print $3}' | grep -vE '^(__bss_start|_edata|_end|_init|_fini)$' |
    while read -r name; do grep -q "\b$name(" "$scratch/prefix/include/longspan.h" || echo "$name"; done | grep .; then
  echo "liblongspan shows what longspan.h does not declare" && exit 1
fi
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

# a C++ program, which links nothing more than a C program
cat >"$scratch/main.cpp" <<'END'
#include <longspan.h>
int main()
{
    ls_context *ctx = nullptr;
    const ls_context_options alone = {};
    if (ls_context_create(&alone, &ctx) != LS_OK) return 1;
    ls_context_free(ctx);
    return 0;
}
END
c++ -std=c++17 ${CXXFLAGS-} "$scratch/main.cpp" -o "$scratch/from_cpp" "${flags[@]}" -Wl,-rpath,"$(dirname "$library")"
"$scratch/from_cpp"

# by CMake it needs language C as well, for MPI: without, one sentence says so
mkdir "$scratch/cpp"
cat >"$scratch/cpp/CMakeLists.txt" <<'END'
cmake_minimum_required(VERSION 3.22)
project(FromCpp LANGUAGES ${languages})
find_package(Longspan REQUIRED)
add_executable(from_cpp ../main.cpp)
target_link_libraries(from_cpp PRIVATE Longspan::longspan)
END
configure() { cmake -S "$scratch/cpp" -B "$scratch/cpp/build" -DCMAKE_PREFIX_PATH="$scratch/prefix" "-Dlanguages=$1" 2>&1; }
if complaint=$(configure CXX); then echo "found without language C" && exit 1; fi
grep -q "enable it too" <<<"$complaint" || { echo "$complaint"; exit 1; }
rm -r "$scratch/cpp/build"
configure "C;CXX" >"$scratch/cpp.log"
cmake --build "$scratch/cpp/build" >>"$scratch/cpp.log"
"$scratch/cpp/build/from_cpp"

# the installed program runs from where it is
"$scratch/prefix/bin/longspan" --version
