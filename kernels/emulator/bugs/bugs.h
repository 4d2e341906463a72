/* The parameter struct of the kernels in this folder; tests/emulator.rs and tests/emulator_bugs.rs mirror it. */
#pragma once
#include <stdint.h>

typedef struct {
  uint64_t in;
  uint64_t out;
  uint64_t counters; /* [64] uint32, zero at first */
  uint64_t barrier;  /* GridBarrier */
  uint32_t n, pad;
} BugParams;
