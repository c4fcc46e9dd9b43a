#!/usr/bin/env bash
# Installs what building, testing and running Longspan needs, on Debian 12 and its relatives.
# Quick and silent on the network when nothing is missing, so other scripts may call it every time.
set -euo pipefail

usage() {
  cat <<'EOF'
usage: scripts/setup.sh [--check] [--plots]

Installs the missing packages with apt-get (as root, or through passwordless sudo).
  --check   only report what is missing; install nothing
  --plots   also gnuplot, for scripts/plot-bench and scripts/scaling
  --help    this text
Exit status: 0 all is there, 1 an installation failed, 2 something is missing that it may not install.
EOF
}

say() { printf 'setup: %s\n' "$*"; }
die() { local code=$1; shift; say "$*" >&2; exit "$code"; }

check_only=no plots=no
for arg in "$@"; do
  case $arg in
    --check) check_only=yes ;;
    --plots) plots=yes ;;
    --help|-h) usage; exit 0 ;;
    *) usage >&2; die 2 "unknown option '$arg'." ;;
  esac
done

packages=(
  gcc g++ make cmake ninja-build pkg-config git ca-certificates   # toolchain
  libopenmpi-dev openmpi-bin                                      # MPI (brings the ssh client mpirun looks for)
  libopenblas-pthread-dev libhdf5-openmpi-dev zlib1g-dev          # numerics, checkpoints
  librandom123-dev libxxhash-dev                                  # counter-based random numbers, checksums
  libcyaml-dev libyaml-dev libjansson-dev                         # configuration in, metrics out
  libcmocka-dev                                                   # unit tests
  python3 hdf5-tools libsword-utils                               # scripts: data, plots, looking into checkpoints
)

[ "$plots" = no ] || packages+=(gnuplot-nox)

# Without apt-get there is nothing to install with: look for the things themselves, since clusters
# bring them as modules. libsword-utils is left out: it only reads a data set made of Debian packages.
probe_without_apt() {
  local missing=() tool lib
  for tool in cc c++ cmake git pkg-config mpicc mpirun python3 h5dump; do
    command -v "$tool" >/dev/null || missing+=("$tool")
  done
  command -v ninja >/dev/null || command -v make >/dev/null || missing+=("ninja or make")
  for lib in openblas yaml-0.1 libcyaml jansson libxxhash cmocka zlib; do
    pkg-config --exists "$lib" 2>/dev/null || missing+=("library $lib (by pkg-config)")
  done
  command -v h5pcc >/dev/null || pkg-config --exists hdf5-openmpi 2>/dev/null || pkg-config --exists hdf5-mpi 2>/dev/null ||
    missing+=("HDF5 built for MPI (h5pcc, or hdf5-mpi by pkg-config)")
  printf '#include <Random123/philox.h>\n' | mpicc -E -x c - >/dev/null 2>&1 || missing+=("header Random123/philox.h")

  if [ ${#missing[@]} -eq 0 ]; then
    say "everything needed was found."
    exit 0
  fi
  say "this system has no apt-get, so install these its own way:" >&2
  printf '  %s\n' "${missing[@]}" >&2
  die 2 "Longspan needs a C11 and a C++ compiler, CMake with Ninja or make, MPI, OpenBLAS, parallel HDF5, zlib, Random123, xxHash, libyaml, libcyaml, jansson, cmocka, python3 and the HDF5 tools."
}

if ! command -v apt-get >/dev/null || ! command -v dpkg-query >/dev/null; then probe_without_apt; fi

# dpkg-query fails when it knows nothing of a name, yet still prints the others.
installed=" $(dpkg-query -W -f '${db:Status-Status}=${Package} ' "${packages[@]}" 2>/dev/null || true)"
missing=()
for package in "${packages[@]}"; do
  [[ $installed == *" installed=$package "* ]] || missing+=("$package")
done

if [ ${#missing[@]} -eq 0 ]; then
  say "all ${#packages[@]} packages are installed."
  exit 0
fi
if [ "$check_only" = yes ]; then
  die 2 "missing ${#missing[@]} of ${#packages[@]} packages: ${missing[*]}"
fi

install=(apt-get install -y --no-install-recommends "${missing[@]}")
if [ "$(id -u)" -eq 0 ]; then
  as_root=(env DEBIAN_FRONTEND=noninteractive)
elif command -v sudo >/dev/null && sudo -n true 2>/dev/null; then
  as_root=(sudo -n env DEBIAN_FRONTEND=noninteractive)   # sudo drops the environment: set it inside
else
  say "packages are missing and installing them needs root or passwordless sudo; run this as root (after 'apt-get update' on a fresh system), then start setup again:" >&2
  printf '%s\n' "${install[*]}"
  exit 2
fi

say "installing ${#missing[@]} of ${#packages[@]} packages: ${missing[*]}"
# Fresh containers have no lists, and old lists name files that are gone. A list that cannot be
# refreshed (a third party's, say) need not stop us: the installation itself tells.
"${as_root[@]}" apt-get update -q ||
  say "some package lists could not be refreshed; going on with those at hand." >&2
"${as_root[@]}" "${install[@]}" ||
  die 1 "apt-get could not install the packages; its message is above."
say "done."
