/* Output projection of attention, added to the residual stream: x[m] += E(w in[m]), see project.cuh.
 *
 * in [M, Q*d] E (attention output), w [D, Q*d] E, x [M, D] float.
 * Bound at 14B, 1-3 rows: 52.4 MB of bf16 weights per layer; many rows: 52.4 MFLOP per row.
 * A unit (gemv.cuh) is two neighbouring outputs.
 * Variants: plain (warp per unit, one pass over w for up to 8 rows), tile (64 x 64 tiles, many rows); from packed
 * weights stream, ring (equal shares per SM) and mma (tensor-core tiles, many rows): product.cuh.
 */
#include "project.cuh"

KERNEL(o_proj_plain_f32, ProjectParams, 256, 2) { project<float, Loop::kPlain>(p); }
KERNEL(o_proj_plain_bf16, ProjectParams, 256, 2) { project<bf16, Loop::kPlain>(p); }
KERNEL(o_proj_tile_f32, ProjectParams, 256, 2) { project<float, Loop::kTile>(p); }
KERNEL(o_proj_tile_bf16, ProjectParams, 256, 2) { project<bf16, Loop::kTile>(p); }
KERNEL(o_proj_stream_bf16, ProjectParams, 256, 2) { project<bf16, Loop::kStream>(p); }
KERNEL(o_proj_ring_bf16, ProjectParams, 256, 2) { project<bf16, Loop::kRing>(p); }
KERNEL(o_proj_mma_bf16, ProjectParams, kMmaThreads, 1) { project<bf16, Loop::kMma>(p); }
