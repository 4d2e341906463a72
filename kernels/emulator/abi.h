/* What the emulator and src/device/emulated/ffi.rs share. Plain C, fixed widths. */
#pragma once
#include <stdint.h>

typedef struct {
  uint32_t grid[3], block[3], cluster[3];
  uint32_t shared_bytes;           /* dynamic, per block */
  uint32_t cooperative, dependent; /* 0 or 1 */
} WarpstepEmuGeometry;

typedef struct {
  uint64_t seed;
  uint32_t order;        /* of ready threads and of blocks: 0 in order, 1 reverse, 2 random */
  uint32_t async_copies; /* land: 0 as late as allowed, 1 at once, 2 at random */
  uint32_t workers;      /* OS threads for launches whose blocks are independent */
  uint32_t poison;       /* 0 or 1: shared memory starts as NaN */
  uint32_t strict;       /* 0 or 1: divergent block barriers, and those after an exit, are errors */
  uint32_t sm_count;     /* bounds cooperative launches */
} WarpstepEmuOptions;

typedef struct {
  uint64_t start, end;
} WarpstepEmuSpan;

/* A piece of device memory with one name and one set of declarations; pieces are disjoint and sorted.
 * race: whole allocations, to find accesses outside them. count: every name and declaration by itself, and the
 * counters are outputs. */
typedef struct {
  uint64_t start, end;
  uint32_t may_read, may_write; /* 0 or 1: the node declares it */
  uint64_t read_bytes, read_unique_bytes, written_bytes, written_unique_bytes;
  uint64_t undeclared_bytes; /* of those, accesses that the node does not declare */
} WarpstepEmuPiece;

typedef struct {
  const void* kernel; /* from warpstep_emu_find */
  const void* params;
  uint64_t params_bytes;
  WarpstepEmuGeometry geometry;
  WarpstepEmuOptions options;
  /* sorted, disjoint: what other nodes of the list write; not to be touched before griddep_wait */
  const WarpstepEmuSpan* foreign;
  uint64_t foreign_count;
  WarpstepEmuPiece* pieces; /* race and count */
  uint64_t piece_count;
} WarpstepEmuLaunch;

typedef struct {
  uint64_t params_bytes;
  uint32_t max_threads;
} WarpstepEmuKernelInfo;
