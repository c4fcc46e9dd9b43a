# Every test is one program tests/test_NAME.c; those that exercise core, kernels and parallel are built in float and in
# double from the same source. Ranks are oversubscribed on purpose: the laws are about correctness, not speed.
pkg_check_modules(CMOCKA REQUIRED IMPORTED_TARGET cmocka)

add_library(longspan_double STATIC EXCLUDE_FROM_ALL ${sources})
longspan_library(longspan_double)
target_compile_definitions(longspan_double PUBLIC LS_REAL_DOUBLE)

set(mpirun ${MPIEXEC_EXECUTABLE} --oversubscribe --allow-run-as-root --bind-to none)
set(test_environment OMPI_MCA_mpi_yield_when_idle=1;OMPI_ALLOW_RUN_AS_ROOT=1;OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1;OMP_NUM_THREADS=1;OPENBLAS_NUM_THREADS=1)

# longspan_test(NAME [DOUBLE] [HDF5] [RANKS 1 2 ...] [ARGS ...]): programs test_NAME and, with DOUBLE, test_NAME_double,
# each run once for every rank count.
function(longspan_test name)
  cmake_parse_arguments(T "DOUBLE;HDF5;TRAINER" "" "RANKS;ARGS;SOURCES" ${ARGN})
  set(variants ${name})
  if(T_DOUBLE)
    list(APPEND variants ${name}_double)
  endif()
  foreach(variant ${variants})
    if(variant MATCHES "_double$")
      set(library longspan_double)
    elseif(T_TRAINER)
      set(library trainer)
    else()
      set(library longspan)
    endif()
    add_executable(test_${variant} ${PROJECT_SOURCE_DIR}/tests/test_${name}.c ${T_SOURCES})
    set_target_properties(test_${variant} PROPERTIES RUNTIME_OUTPUT_DIRECTORY ${PROJECT_BINARY_DIR}/tests)
    target_include_directories(test_${variant} PRIVATE ${PROJECT_SOURCE_DIR}/tests)
    target_link_libraries(test_${variant} PRIVATE ${library} PkgConfig::CMOCKA longspan_flags m)
    if(T_HDF5)
      target_include_directories(test_${variant} SYSTEM PRIVATE ${HDF5_C_INCLUDE_DIRS})
      target_link_libraries(test_${variant} PRIVATE ${HDF5_C_LIBRARIES})
    endif()
    if(NOT T_RANKS)
      add_test(NAME ${variant} COMMAND test_${variant} ${T_ARGS})
      set_tests_properties(${variant} PROPERTIES ENVIRONMENT "${test_environment}" TIMEOUT 1500)
    endif()
    foreach(ranks ${T_RANKS})
      add_test(NAME ${variant}_${ranks} COMMAND ${mpirun} -n ${ranks} $<TARGET_FILE:test_${variant}> ${T_ARGS})
      set_tests_properties(${variant}_${ranks} PROPERTIES ENVIRONMENT "${test_environment}" TIMEOUT 1500
        PROCESSORS ${ranks})
    endforeach()
  endforeach()
endfunction()

set(harness ${PROJECT_SOURCE_DIR}/tests/harness.c)
set(golden ${PROJECT_SOURCE_DIR}/tests/golden)
longspan_test(dense DOUBLE)
longspan_test(exchange DOUBLE RANKS 1 2 3 4 5 7)
longspan_test(golden DOUBLE HDF5 SOURCES ${harness} RANKS 1 2 3 5 ARGS ${golden})
longspan_test(gradients DOUBLE SOURCES ${harness} RANKS 1 2)
longspan_test(probsparse DOUBLE SOURCES ${harness} RANKS 1 3)
longspan_test(laws DOUBLE SOURCES ${harness} RANKS 1 2 3 4 5 7)

longspan_test(config TRAINER)
longspan_test(optim TRAINER)
longspan_test(pack TRAINER)
longspan_test(checkpoint TRAINER)
longspan_test(data TRAINER RANKS 1 2 3)
longspan_test(model TRAINER RANKS 1 2 3 5)

# ---- the program and the installed package, as their users meet them
add_test(NAME train_equality COMMAND ${PROJECT_SOURCE_DIR}/tests/train_equality.sh $<TARGET_FILE:longspan_program>
  ${PROJECT_BINARY_DIR}/tests/train_equality)
add_test(NAME faults COMMAND ${PROJECT_SOURCE_DIR}/tests/faults.sh $<TARGET_FILE:longspan_program>
  ${PROJECT_BINARY_DIR}/tests/faults)
add_test(NAME readme COMMAND ${PROJECT_SOURCE_DIR}/tests/readme.py $<TARGET_FILE:longspan_program>
  ${PROJECT_SOURCE_DIR}/README.md)
add_test(NAME install COMMAND ${PROJECT_SOURCE_DIR}/tests/install.sh ${PROJECT_BINARY_DIR} ${PROJECT_SOURCE_DIR})
if(LONGSPAN_SANITIZE) # what links a sanitized library must be built so itself
  list(APPEND test_environment "CFLAGS=-fsanitize=${LONGSPAN_SANITIZE}")
endif()
set_tests_properties(train_equality faults install readme PROPERTIES ENVIRONMENT "${test_environment}" TIMEOUT 1500)
