#!/usr/bin/env bash
# mpirun as every script here starts it: also as root (in a container), also on fewer cores than ranks, one thread per rank.
#   scripts/mpirun.sh -n RANKS PROGRAM ARGUMENT...
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
export OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1
export OMPI_MCA_btl_vader_single_copy_mechanism=none # containers often forbid reading another process's memory
exec mpirun --oversubscribe --bind-to none "$@"
