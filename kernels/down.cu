/* Down projection of the MLP, added to the residual stream: x[m] += E(w in[m]), see project.cuh.
 *
 * in [M, I] E (gate_up's activations), w [D, I] E, x [M, D] float.
 * Bound at 14B, 1-3 rows: 141.6 MB of bf16 weights per layer; many rows: 141.6 MFLOP per row.
 * A unit (gemv.cuh) is two neighbouring outputs.
 * Variants: plain (warp per unit, one pass over w for up to 8 rows), tile (64 x 64 tiles, many rows); from packed
 * weights stream, ring (equal shares per SM) and mma (tensor-core tiles, many rows): product.cuh.
 */
#include "project.cuh"

KERNEL(down_plain_f32, ProjectParams, 256, 2) { project<float, Loop::kPlain>(p); }
KERNEL(down_plain_bf16, ProjectParams, 256, 2) { project<bf16, Loop::kPlain>(p); }
KERNEL(down_tile_f32, ProjectParams, 256, 2) { project<float, Loop::kTile>(p); }
KERNEL(down_tile_bf16, ProjectParams, 256, 2) { project<bf16, Loop::kTile>(p); }
KERNEL(down_stream_bf16, ProjectParams, 256, 2) { project<bf16, Loop::kStream>(p); }
KERNEL(down_ring_bf16, ProjectParams, 256, 2) { project<bf16, Loop::kRing>(p); }
KERNEL(down_mma_bf16, ProjectParams, kMmaThreads, 1) { project<bf16, Loop::kMma>(p); }
