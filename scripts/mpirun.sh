#!/usr/bin/env bash
# mpirun as every script here starts it: also as root (in a container), also on fewer cores than ranks, one thread per rank.
#   scripts/mpirun.sh -n RANKS PROGRAM ARGUMENT...
# Options are mpirun's, except --help, which shows this.
case ${1-} in
'') echo "mpirun.sh: which program? (see --help)" >&2 && exit 2 ;;
-h | --help) sed -n '2,4s/^# \{0,1\}//p' "$0" && exit 0 ;;
esac
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
export OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1
export OMPI_MCA_btl_vader_single_copy_mechanism=none # containers often forbid reading another process's memory
exec mpirun --oversubscribe --bind-to none "$@"
