/* The launch that all of the transformer's products share: prologue, wait, and the loop that the variant names.
 *
 *   sum[m, u, half] = dot(weight(u, half), h[m, :])       for rows m and units u (gemv.cuh); then emit(m, u, sums)
 *
 *   plain, tile          any shape, float or bf16, weights row by row as stored: weight(unit, half)
 *   stream, ring, mma    bf16, K a multiple of 32, weights packed (packed.cuh): Product::w
 *
 * One epilogue serves all of them. Where every weight row is an output of its own, row_product pairs them.
 */
#pragma once
#include "gemm_tile.cuh"
#include "mma.cuh"
#include "stream.cuh"

/* activations() -> Raw or Normed, called after griddep_wait by all threads; weight and emit as for gemv. `lookups`:
 * what stream and ring have looked up for emit (stream.cuh); the other loops leave it alone. */
template <Loop LOOP, class E, class Activations, class Weight, class Emit, class Lookups>
DEV void product(const Product& p, Activations activations, Weight weight, Emit emit, Lookups& lookups) {
  griddep_launch();
  if constexpr (LOOP == Loop::kStream) {
    /* A chunk of loads may hold one end of a tile; short rows go step by step. */
    if (p.inner >= 8 * kStepK) {
      stream<Direct<8>>(p, activations, emit, lookups);
    } else {
      stream<Direct<1>>(p, activations, emit, lookups);
    }
  } else if constexpr (LOOP == Loop::kRing) {
    stream<Ring>(p, activations, emit, lookups);
  } else if constexpr (LOOP == Loop::kMma) {
    mma_product(p, activations, emit);
  } else {
    if (LOOP == Loop::kPlain) gemv_prefetch<E>(p.inner, p.units, weight);
    griddep_wait();
    const auto h = activations();
    if constexpr (LOOP == Loop::kPlain) {
      gemv<E>(h, p.rows, p.inner, p.units, p.vec, weight, emit);
    } else {
      gemm_tile<E>(h, p.rows, p.inner, p.units, p.vec, weight, emit);
    }
  }
}

template <Loop LOOP, class E, class Activations, class Weight, class Emit>
DEV void product(const Product& p, Activations activations, Weight weight, Emit emit) {
  NoLookups none;
  product<LOOP, E>(p, activations, weight, emit, none);
}

/* The product whose outputs are the rows of one matrix [outputs, K] at p.w: a unit is two neighbouring rows, the last
 * one of an odd matrix has one. emit_one(row, output, sum). */
template <Loop LOOP, class E, class Activations, class EmitOne>
DEV void row_product(const Product& p, uint32_t outputs, Activations activations, EmitOne emit_one) {
  const E* w = ptr<const E>(p.w);
  const uint32_t inner = p.inner;
  auto weight = [=](uint32_t unit, uint32_t which) -> const E* {
    const uint32_t out = unit * 2 + which;
    return out < outputs ? w + size_t(out) * inner : nullptr;
  };
  auto emit = [=](uint32_t row, uint32_t unit, float a, float b) {
    emit_one(row, unit * 2, a);
    if (unit * 2 + 1 < outputs) emit_one(row, unit * 2 + 1, b);
  };
  product<LOOP, E>(p, activations, weight, emit);
}
