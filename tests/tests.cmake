# Every test is one program tests/test_NAME.c; those that exercise core, kernels and parallel are built in float and in
# double from the same source. Ranks are oversubscribed on purpose: the laws are about correctness, not speed.
pkg_check_modules(CMOCKA REQUIRED IMPORTED_TARGET cmocka)

add_library(longspan_double STATIC EXCLUDE_FROM_ALL ${sources})
longspan_library(longspan_double)
target_compile_definitions(longspan_double PUBLIC LS_REAL_DOUBLE)

# ---- the CUDA kernels on the CPU: the same .cu files as C++, before whose headers the emulator's stand. CMake knows one
# language of a file, so each gets a file of one line; -O2, since there is much to compile and little that vectors.
enable_language(CXX)
set(emulated_wrappers)
foreach(source ${cuda_sources})
  file(RELATIVE_PATH wrapper ${PROJECT_SOURCE_DIR} ${source})
  set(wrapper ${PROJECT_BINARY_DIR}/emulated/${wrapper}.cpp)
  file(CONFIGURE OUTPUT ${wrapper} CONTENT "#include \"${source}\"\n")
  list(APPEND emulated_wrappers ${wrapper})
endforeach()
# slabs so small that sequences of the tests are several
set_source_files_properties(${PROJECT_BINARY_DIR}/emulated/kernels/linear_slabs.cu.cpp PROPERTIES
  COMPILE_DEFINITIONS LS_LINEAR_SLAB=512)
# GCC 12 gave lanes of a loop with a condition in it the numbers of others there
set_source_files_properties(${PROJECT_BINARY_DIR}/emulated/kernels/softmax_tensor.cu.cpp PROPERTIES
  COMPILE_OPTIONS -fno-tree-vectorize)
function(longspan_emulated_code name)
  longspan_library(${name})
  set_target_properties(${name} PROPERTIES CXX_STANDARD 20 CXX_STANDARD_REQUIRED ON CXX_EXTENSIONS OFF)
  # and so little memory for operands in bfloat16 that products are cut; so few blocks that each has many tiles of rows
  target_compile_definitions(${name} PUBLIC LS_CUDA_BACKEND LS_NCCL_BACKEND LS_NARROW_SIDE=32 LS_SLOT_BLOCKS=8)
  target_include_directories(${name} BEFORE PUBLIC ${PROJECT_SOURCE_DIR}/tests/emulator)
  # of the CPU's code little runs there
  target_compile_options(${name} PRIVATE "$<$<COMPILE_LANGUAGE:C>:-O1>"
    "$<$<COMPILE_LANGUAGE:CXX>:-O2;-Wno-unknown-pragmas;-Wno-deprecated-enum-enum-conversion>")
endfunction()
function(longspan_emulated name)
  add_library(${name} STATIC EXCLUDE_FROM_ALL ${sources} ${nccl_source} ${ARGN}
    ${PROJECT_SOURCE_DIR}/tests/emulator/emulator.cpp ${PROJECT_SOURCE_DIR}/tests/emulator/nccl.cpp)
  longspan_emulated_code(${name})
endfunction()
longspan_emulated(longspan_emulated ${emulated_wrappers})
# every access of kernels to memory looked at (tests/emulator/checks.h): the calls that the sanitizer compiles in are
# answered by checks.cpp, and nothing of the sanitizer's is linked; but two cannot be had together
if(NOT LONGSPAN_SANITIZE)
  # no scalars in place of aggregates: what a thread reads at once is one access
  set(checked_flags -fno-tree-sra -fno-ipa-sra -fsanitize=thread --param=tsan-instrument-func-entry-exit=0 -g1)
  add_library(checked_kernels OBJECT EXCLUDE_FROM_ALL ${emulated_wrappers})
  longspan_emulated(longspan_checked $<TARGET_OBJECTS:checked_kernels>
    ${PROJECT_SOURCE_DIR}/tests/emulator/checks.cpp)
  target_compile_definitions(longspan_checked PUBLIC EMULATOR_CHECKS)
  longspan_emulated_code(checked_kernels)
  target_compile_definitions(checked_kernels PRIVATE EMULATOR_CHECKS)
  target_compile_options(checked_kernels PRIVATE ${checked_flags})
endif()
# tensor cores know no double
list(TRANSFORM emulated_wrappers REPLACE "^.*/softmax_tensor[.]cu[.]cpp$"
  ${PROJECT_SOURCE_DIR}/tests/emulator/softmax_tensor.cpp OUTPUT_VARIABLE emulated_double)
longspan_emulated(longspan_emulated_double ${emulated_double})
target_compile_definitions(longspan_emulated_double PUBLIC LS_REAL_DOUBLE)
add_library(trainer_emulated STATIC EXCLUDE_FROM_ALL ${trainer_sources})
trainer_library(trainer_emulated longspan_emulated)
if(TARGET longspan_checked)
  add_library(trainer_checked STATIC EXCLUDE_FROM_ALL $<TARGET_OBJECTS:trainer_emulated>)
  trainer_library(trainer_checked longspan_checked)
endif()

set(mpirun ${MPIEXEC_EXECUTABLE} --oversubscribe --allow-run-as-root --bind-to none)
set(test_environment OMPI_MCA_mpi_yield_when_idle=1;OMPI_ALLOW_RUN_AS_ROOT=1;OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1;OMP_NUM_THREADS=1;OPENBLAS_NUM_THREADS=1)

# single copies read another process past its protection of device memory
set(every 9) # one setting in so many: fibers are slow, and slower under sanitizers
if(LONGSPAN_SANITIZE)
  set(every 45)
endif()
set(emulated_environment LONGSPAN_TEST_DEVICE=cuda LONGSPAN_TEST_EVERY=${every} OMPI_MCA_btl_vader_single_copy_mechanism=none)

math(EXPR every_rounded "3 * ${every}")
math(EXPR every_checked "9 * ${every}")
set(checked_environment LONGSPAN_POISON=1 LONGSPAN_TEST_EVERY=${every_checked})
set(nccl_environment LONGSPAN_TEST_TRANSPORT=nccl LONGSPAN_EMULATOR_GPUS=1 LONGSPAN_TEST_EVERY=${every_rounded})

# longspan_test(NAME [DOUBLE] [HDF5] [RANKS 1 2 ...] [DOUBLE_RANKS 1 3 ...] [ARGS ...] [EMULATED 1 2 ...]
# [EMULATED_DOUBLE 1 2 ...]): programs test_NAME and, with DOUBLE, test_NAME_double, each run once for every rank count,
# or in double for DOUBLE_RANKS. EMULATED: test_NAME_emulated, and EMULATED_DOUBLE: test_NAME_emulated_double, the same
# test on the emulated GPU, for these rank counts; CHECKED: on one that looks at every access, with work memory that is
# nobody's until it is written, with CHECKED_ARGS besides. OUTSIDE: with the library as it is installed, which shows the
# public header's functions alone.
function(longspan_test name)
  cmake_parse_arguments(T "DOUBLE;HDF5;TRAINER;OUTSIDE" ""
    "RANKS;DOUBLE_RANKS;ARGS;SOURCES;EMULATED;EMULATED_DOUBLE;CHECKED;CHECKED_ARGS" ${ARGN})
  set(variants ${name})
  if(T_DOUBLE)
    list(APPEND variants ${name}_double)
  endif()
  if(T_EMULATED)
    list(APPEND variants ${name}_emulated)
  endif()
  if(T_EMULATED_DOUBLE)
    list(APPEND variants ${name}_emulated_double)
  endif()
  if(T_CHECKED AND TARGET longspan_checked)
    list(APPEND variants ${name}_checked)
  endif()
  foreach(variant ${variants})
    set(variant_ranks ${T_RANKS})
    set(arguments ${T_ARGS})
    set(environment ${test_environment})
    if(variant MATCHES "_(emulated|emulated_double|checked)$")
      set(library ${CMAKE_MATCH_1})
      string(TOUPPER ${library} ranks)
      set(variant_ranks ${T_${ranks}})
      if(T_TRAINER)
        set(library trainer_${library})
      else()
        set(library longspan_${library})
      endif()
      list(APPEND environment ${emulated_environment})
      if(variant MATCHES "checked$")
        list(APPEND environment ${checked_environment})
        list(APPEND arguments ${T_CHECKED_ARGS})
      endif()
    elseif(variant MATCHES "_double$")
      set(library longspan_double)
      if(T_DOUBLE_RANKS)
        set(variant_ranks ${T_DOUBLE_RANKS})
      endif()
    elseif(T_TRAINER)
      set(library trainer)
    elseif(T_OUTSIDE)
      set(library longspan)
    else()
      set(library longspan_inside)
    endif()
    add_executable(test_${variant} ${PROJECT_SOURCE_DIR}/tests/test_${name}.c ${T_SOURCES})
    set_target_properties(test_${variant} PROPERTIES RUNTIME_OUTPUT_DIRECTORY ${PROJECT_BINARY_DIR}/tests)
    target_include_directories(test_${variant} PRIVATE ${PROJECT_SOURCE_DIR}/tests)
    target_link_libraries(test_${variant} PRIVATE ${library} PkgConfig::CMOCKA longspan_flags m)
    target_compile_options(test_${variant} PRIVATE -O1) # compiled up to four times, and what they wait for is the library
    if(T_HDF5)
      target_include_directories(test_${variant} SYSTEM PRIVATE ${HDF5_C_INCLUDE_DIRS})
      target_link_libraries(test_${variant} PRIVATE ${HDF5_C_LIBRARIES})
    endif()
    if(NOT variant_ranks)
      add_test(NAME ${variant} COMMAND test_${variant} ${arguments})
      set_tests_properties(${variant} PROPERTIES ENVIRONMENT "${environment}" TIMEOUT 1500)
    endif()
    foreach(ranks ${variant_ranks})
      add_test(NAME ${variant}_${ranks} COMMAND ${mpirun} -n ${ranks} $<TARGET_FILE:test_${variant}> ${arguments})
      # ranks that wait for one another keep processors busy, and take many times as long beside others that do; but
      # emulated ones sleep
      set(alone FALSE)
      if(ranks GREATER 1 AND NOT variant MATCHES "_(emulated|emulated_double|checked)$")
        set(alone TRUE)
      endif()
      set_tests_properties(${variant}_${ranks} PROPERTIES ENVIRONMENT "${environment}" TIMEOUT 1500
        PROCESSORS ${ranks} RUN_SERIAL ${alone})
    endforeach()
  endforeach()
endfunction()

set(harness ${PROJECT_SOURCE_DIR}/tests/harness.c ${PROJECT_SOURCE_DIR}/tests/device_shim.c)
set(golden ${PROJECT_SOURCE_DIR}/tests/golden)
longspan_test(gemm DOUBLE)
longspan_test(dense DOUBLE CHECKED 1 EMULATED 1 EMULATED_DOUBLE 1)
longspan_test(pinv EMULATED 1)
longspan_test(exchange DOUBLE RANKS 1 2 3 4 5 7)
foreach(variant exchange exchange_double)
  target_link_options(test_${variant} PRIVATE -Wl,--wrap=calloc) # which fails there when it is told to
endforeach()
longspan_test(refusals OUTSIDE RANKS 1 2 3)
longspan_test(golden DOUBLE CHECKED 1 HDF5 SOURCES ${harness} RANKS 1 2 3 5 ARGS ${golden}
  EMULATED 1 3 EMULATED_DOUBLE 3)
longspan_test(gradients DOUBLE SOURCES ${harness} RANKS 1 2 EMULATED_DOUBLE 1)
longspan_test(probsparse DOUBLE SOURCES ${harness} RANKS 1 3 EMULATED 1 3 EMULATED_DOUBLE 1 3)
longspan_test(laws DOUBLE CHECKED 2 SOURCES ${harness} RANKS 1 2 3 4 5 7 DOUBLE_RANKS 1 3 7 EMULATED 1 2 3)
longspan_test(limits SOURCES ${harness} RANKS 1 EMULATED 1 2 EMULATED_DOUBLE 1 CHECKED 1 CHECKED_ARGS --pieces)
set_tests_properties(limits_1 PROPERTIES SKIP_RETURN_CODE 77) # there is nothing to limit on the CPU
longspan_test(precision DOUBLE CHECKED 1 SOURCES ${harness} RANKS 1 EMULATED 1 2 EMULATED_DOUBLE 1)

# golden files with operands rounded, on the emulated GPU
foreach(run bf16_1 bf16_3 tf32_1)
  string(REGEX MATCH "([a-z0-9]+)_([0-9])" match ${run})
  set(test golden_emulated_${run})
  add_test(NAME ${test} COMMAND ${mpirun} -n ${CMAKE_MATCH_2} $<TARGET_FILE:test_golden_emulated> ${golden})
  set_tests_properties(${test} PROPERTIES ENVIRONMENT
    "${test_environment};${emulated_environment};LONGSPAN_TEST_PRECISION=${CMAKE_MATCH_1}" TIMEOUT 1500
    PROCESSORS ${CMAKE_MATCH_2})
endforeach()

# laws with operands rounded, of fewer settings; probsparse's selection, which must not be rounded
foreach(run laws_bf16_1 laws_bf16_2 probsparse_bf16_3)
  string(REGEX MATCH "([a-z]+)_bf16_([0-9])" match ${run})
  set(ranks ${CMAKE_MATCH_2})
  set(test ${CMAKE_MATCH_1}_emulated_bf16_${ranks})
  add_test(NAME ${test} COMMAND ${mpirun} -n ${ranks} $<TARGET_FILE:test_${CMAKE_MATCH_1}_emulated>)
  set_tests_properties(${test} PROPERTIES ENVIRONMENT
    "${test_environment};${emulated_environment};LONGSPAN_TEST_PRECISION=bf16;LONGSPAN_TEST_EVERY=${every_rounded}"
    TIMEOUT 1500 PROCESSORS ${ranks})
endforeach()

# tensor cores, with copies to shared memory that are made at once or when they are waited for, and on a GPU where a
# block has 99 KiB: one shape in three
foreach(run ORDER=11 SHARED=99)
  string(REGEX MATCH "[A-Z]+" name ${run})
  string(TOLOWER ${name} name)
  add_test(NAME precision_emulated_${name} COMMAND $<TARGET_FILE:test_precision_emulated>)
  set_tests_properties(precision_emulated_${name} PROPERTIES ENVIRONMENT
    "${test_environment};${emulated_environment};LONGSPAN_EMULATOR_${run};LONGSPAN_TEST_EVERY=${every_rounded}"
    TIMEOUT 1500)
endforeach()

# central differences call a core hundreds of times: of all elements together
set_tests_properties(gradients_emulated_double_1 PROPERTIES ENVIRONMENT
  "${test_environment};${emulated_environment};LONGSPAN_TEST_EVERY=${every_checked}")

# GPUs whose blocks have little memory, in KiB: what does not fit is refused, or done in smaller tiles
foreach(shared 64 99)
  add_test(NAME limits_emulated_shared_${shared} COMMAND $<TARGET_FILE:test_limits_emulated>)
  set_tests_properties(limits_emulated_shared_${shared} PROPERTIES ENVIRONMENT
    "${test_environment};${emulated_environment};LONGSPAN_EMULATOR_SHARED=${shared}" TIMEOUT 1500)
endforeach()

# golden files with streams that run at any time that their events allow
add_test(NAME golden_emulated_order_3 COMMAND ${mpirun} -n 3 $<TARGET_FILE:test_golden_emulated> ${golden})
set_tests_properties(golden_emulated_order_3 PROPERTIES ENVIRONMENT
  "${test_environment};${emulated_environment};LONGSPAN_EMULATOR_ORDER=7" TIMEOUT 1500 PROCESSORS 3)

# ranks that have a GPU each and speak by NCCL: laws of fewer settings
foreach(run golden_3 laws_2)
  string(REGEX MATCH "([a-z]+)_([0-9])" match ${run})
  set(test ${CMAKE_MATCH_1}_emulated_nccl_${CMAKE_MATCH_2})
  set(ranks ${CMAKE_MATCH_2})
  set(command $<TARGET_FILE:test_${CMAKE_MATCH_1}_emulated>)
  if(run MATCHES golden)
    list(APPEND command ${golden})
  endif()
  add_test(NAME ${test} COMMAND ${mpirun} -n ${ranks} ${command})
  set_tests_properties(${test} PROPERTIES ENVIRONMENT "${test_environment};${emulated_environment};${nccl_environment}"
    TIMEOUT 1500 PROCESSORS ${ranks})
endforeach()

# ---- the same programs on a GPU, where this build has CUDA and there is one: otherwise they are skipped. Several ranks
# share it by way of host memory, or speak by NCCL where each has one.
if(LONGSPAN_HAS_CUDA)
  add_executable(on_gpu ${PROJECT_SOURCE_DIR}/tests/on_gpu.c)
  set_target_properties(on_gpu PROPERTIES RUNTIME_OUTPUT_DIRECTORY ${PROJECT_BINARY_DIR}/tests)
  target_link_libraries(on_gpu PRIVATE longspan_inside longspan_flags)
  foreach(run golden golden_bf16 golden_tf32 golden_poisoned precision limits probsparse probsparse_bf16 step
      step_bf16 laws laws_bf16 laws_poisoned golden_nccl laws_nccl step_nccl)
    foreach(ranks 1 2 4)
      if(run MATCHES nccl AND ranks EQUAL 1)
        continue()
      endif()
      set(test ${run}_gpu_${ranks})
      string(REGEX MATCH "^([a-z]+)_?(.*)$" match ${run})
      set(name ${CMAKE_MATCH_1})
      set(environment ${test_environment} LONGSPAN_TEST_DEVICE=cuda LONGSPAN_TEST_GPU=1)
      if(CMAKE_MATCH_2 STREQUAL poisoned) # each buffer waits for the GPU then: one setting in nine
        list(APPEND environment LONGSPAN_POISON=1 LONGSPAN_TEST_EVERY=9)
      elseif(CMAKE_MATCH_2 STREQUAL nccl)
        list(APPEND environment LONGSPAN_TEST_TRANSPORT=nccl)
      elseif(CMAKE_MATCH_2)
        list(APPEND environment LONGSPAN_TEST_PRECISION=${CMAKE_MATCH_2})
      endif()
      set(arguments)
      if(name STREQUAL golden)
        set(arguments ${golden})
      endif()
      add_test(NAME ${test} COMMAND on_gpu ${ranks} ${mpirun} -n ${ranks} $<TARGET_FILE:test_${name}> ${arguments})
      set_tests_properties(${test} PROPERTIES ENVIRONMENT "${environment}" TIMEOUT 1500
        PROCESSORS ${ranks} LABELS gpu SKIP_RETURN_CODE 77)
    endforeach()
  endforeach()
  foreach(name dense pinv optim)
    add_test(NAME ${name}_gpu COMMAND test_${name})
    set_tests_properties(${name}_gpu PROPERTIES TIMEOUT 1500 LABELS gpu SKIP_RETURN_CODE 77 ENVIRONMENT
      "${test_environment};LONGSPAN_TEST_DEVICE=cuda;LONGSPAN_TEST_GPU=1")
  endforeach()
  find_program(COMPUTE_SANITIZER compute-sanitizer HINTS ${CUDAToolkit_BIN_DIR})
  foreach(tool memcheck racecheck initcheck synccheck)
    if(NOT COMPUTE_SANITIZER)
      continue()
    endif()
    add_test(NAME ${tool}_gpu COMMAND on_gpu 1 ${COMPUTE_SANITIZER} --tool ${tool} --error-exitcode 1
      $<TARGET_FILE:test_golden> ${golden} 3)
    # some machines lend their GPU to programs, but not to this tool
    set_tests_properties(${tool}_gpu PROPERTIES TIMEOUT 3000 LABELS gpu SKIP_RETURN_CODE 77
      SKIP_REGULAR_EXPRESSION "Device not supported" ENVIRONMENT
      "${test_environment};LONGSPAN_TEST_DEVICE=cuda;LONGSPAN_TEST_GPU=1")
  endforeach()
endif()

foreach(variant emulator emulator_double emulator_checked)
  string(REPLACE emulator longspan_emulated library ${variant})
  string(REPLACE emulated_checked checked library ${library})
  if(NOT TARGET ${library})
    continue()
  endif()
  add_executable(test_${variant} ${PROJECT_SOURCE_DIR}/tests/test_emulator.cpp)
  set_target_properties(test_${variant} PROPERTIES RUNTIME_OUTPUT_DIRECTORY ${PROJECT_BINARY_DIR}/tests CXX_STANDARD 20
    CXX_STANDARD_REQUIRED ON CXX_EXTENSIONS OFF)
  target_include_directories(test_${variant} SYSTEM PRIVATE ${RANDOM123_INCLUDE})
  target_link_libraries(test_${variant} PRIVATE ${library} PkgConfig::CMOCKA longspan_flags)
  target_compile_options(test_${variant} PRIVATE -Wno-unknown-pragmas) # core/cuda.h unrolls loops
  if(variant MATCHES checked)
    target_compile_options(test_${variant} PRIVATE ${checked_flags})
  endif()
  add_test(NAME ${variant} COMMAND test_${variant})
  set_tests_properties(${variant} PROPERTIES ENVIRONMENT "${test_environment}" TIMEOUT 1500)
endforeach()

longspan_test(config TRAINER)
longspan_test(beam TRAINER)
longspan_test(optim TRAINER EMULATED 1 CHECKED 1)
longspan_test(pack TRAINER)
longspan_test(checkpoint TRAINER)
longspan_test(data TRAINER RANKS 1 2 3)
longspan_test(model TRAINER RANKS 1 2 3 5)
longspan_test(step TRAINER RANKS 1 2 3 EMULATED 1 2 CHECKED 1)

# steps with streams that run at any time that their events allow, with operands rounded and by NCCL
foreach(run order_2 bf16_2 nccl_2)
  string(REGEX MATCH "[0-9]$" ranks ${run})
  set(test step_emulated_${run})
  set(setting LONGSPAN_EMULATOR_ORDER=11)
  if(run MATCHES bf16)
    set(setting LONGSPAN_TEST_PRECISION=bf16)
  endif()
  if(run MATCHES nccl)
    set(setting ${nccl_environment})
  endif()
  add_test(NAME ${test} COMMAND ${mpirun} -n ${ranks} $<TARGET_FILE:test_step_emulated>)
  set_tests_properties(${test} PROPERTIES ENVIRONMENT "${test_environment};${emulated_environment};${setting}"
    TIMEOUT 1500 PROCESSORS ${ranks})
endforeach()

# ---- the program and the installed package, as their users meet them
add_test(NAME train_equality COMMAND ${PROJECT_SOURCE_DIR}/tests/train_equality.sh $<TARGET_FILE:longspan_program>
  ${PROJECT_BINARY_DIR}/tests/train_equality)
# the whole trainer on the emulated GPU: the program a second time
add_executable(longspan_program_emulated ${PROJECT_SOURCE_DIR}/trainer/main.c)
set_target_properties(longspan_program_emulated PROPERTIES OUTPUT_NAME longspan_emulated
  RUNTIME_OUTPUT_DIRECTORY ${PROJECT_BINARY_DIR}/tests)
target_link_libraries(longspan_program_emulated PRIVATE trainer_emulated longspan_flags)
add_test(NAME train_device COMMAND ${PROJECT_SOURCE_DIR}/tests/train_device.sh $<TARGET_FILE:longspan_program>
  $<TARGET_FILE:longspan_program_emulated> ${PROJECT_BINARY_DIR}/tests/train_device)
if(LONGSPAN_HAS_CUDA)
  add_test(NAME train_device_gpu COMMAND ${PROJECT_SOURCE_DIR}/tests/train_device.sh $<TARGET_FILE:longspan_program>
    $<TARGET_FILE:longspan_program> ${PROJECT_BINARY_DIR}/tests/train_device_gpu)
  set_tests_properties(train_device_gpu PROPERTIES ENVIRONMENT "${test_environment};LONGSPAN_TEST_GPU=1" TIMEOUT 1500
    LABELS gpu SKIP_RETURN_CODE 77)
endif()
add_test(NAME bench COMMAND ${PROJECT_SOURCE_DIR}/tests/bench.py $<TARGET_FILE:longspan_program>
  $<TARGET_FILE:longspan_program_emulated> ${PROJECT_BINARY_DIR}/tests/bench)
# the formulas that GPUs are compared with; skipped where there is no PyTorch
add_test(NAME bench_formulas COMMAND ${PROJECT_SOURCE_DIR}/scripts/bench-gpu-vs-torch --self-test)
set_tests_properties(bench_formulas PROPERTIES SKIP_RETURN_CODE 77 TIMEOUT 600)
add_test(NAME faults COMMAND ${PROJECT_SOURCE_DIR}/tests/faults.sh $<TARGET_FILE:longspan_program>
  ${PROJECT_BINARY_DIR}/tests/faults)
# the program has started itself anew where OpenBLAS did not know the processor
add_test(NAME blas_kernels COMMAND longspan_program info)
set_tests_properties(blas_kernels PROPERTIES ENVIRONMENT "${test_environment}" PASS_REGULAR_EXPRESSION "OpenBLAS, its kernels for"
  FAIL_REGULAR_EXPRESSION "slow: this processor can do more")
add_test(NAME readme COMMAND ${PROJECT_SOURCE_DIR}/tests/readme.py $<TARGET_FILE:longspan_program>
  ${PROJECT_SOURCE_DIR}/README.md)
add_test(NAME install COMMAND ${PROJECT_SOURCE_DIR}/tests/install.sh ${PROJECT_BINARY_DIR} ${PROJECT_SOURCE_DIR})
if(LONGSPAN_SANITIZE) # what links a sanitized library must be built so itself
  list(APPEND test_environment "CFLAGS=-fsanitize=${LONGSPAN_SANITIZE}" "CXXFLAGS=-fsanitize=${LONGSPAN_SANITIZE}")
endif()
# where a rank ends before the others mpirun waits a second, or two, before it kills them, even if they are gone
set_tests_properties(train_equality train_device bench faults install readme PROPERTIES TIMEOUT 1500
  ENVIRONMENT "${test_environment};OMPI_MCA_odls_base_sigkill_timeout=0")
