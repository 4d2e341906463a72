/* What the bench measures other kernels against, and the random data it measures them on; no model uses these.
 *
 *   bench_copy:   dst[i] = src[i]                             src, dst [elements] 16 bytes
 *   bench_sum:    dst[0] += sum of all 32-bit words of src     src [elements] 16 bytes, dst [1] uint32
 *   bench_fill_*: dst[i] = mean + deviation * normal(seed, i)  dst [elements] E, rounded to E
 *
 * bench_copy and bench_sum are bound by bytes: they are the ceilings that every figure in GB/s is a ratio of.
 * bench_fill makes weights of true shapes where there is no checkpoint. Zeros would flatter: a matrix product runs
 * faster on them. The values are the sum of four 16-bit pieces of a SplitMix64 hash of (seed, i), roughly normal,
 * within 3.5 deviations, and the same whatever the geometry.
 *
 * Grids stride over the data, so that any number of blocks does; 256 threads, four 16-byte loads in flight each.
 */
#include "dev.cuh"

static constexpr uint32_t kThreads = 256;
static constexpr uint32_t kInFlight = 4;

KERNEL(bench_copy, BenchParams, kThreads, 8) {
  griddep_launch();
  griddep_wait();
  const v4u* src = ptr<const v4u>(p.src);
  v4u* dst = ptr<v4u>(p.dst);
  const uint64_t chunk = kThreads * kInFlight;
  for (uint64_t base = bid_x() * chunk; base < p.elements; base += nbid_x() * chunk) {
    v4u v[kInFlight];
#pragma unroll
    for (uint32_t j = 0; j < kInFlight; j++) {
      const uint64_t i = base + j * kThreads + tid_x();
      v[j] = i < p.elements ? ld_stream_v4(src + i) : v4u{0, 0, 0, 0};
    }
#pragma unroll
    for (uint32_t j = 0; j < kInFlight; j++) {
      const uint64_t i = base + j * kThreads + tid_x();
      if (i < p.elements) st_v4(dst + i, v[j]);
    }
  }
}

KERNEL(bench_sum, BenchParams, kThreads, 8) {
  griddep_launch();
  griddep_wait();
  const v4u* src = ptr<const v4u>(p.src);
  const uint64_t chunk = kThreads * kInFlight;
  uint32_t sum = 0;
  for (uint64_t base = bid_x() * chunk; base < p.elements; base += nbid_x() * chunk) {
    v4u v[kInFlight];
#pragma unroll
    for (uint32_t j = 0; j < kInFlight; j++) {
      const uint64_t i = base + j * kThreads + tid_x();
      v[j] = i < p.elements ? ld_stream_v4(src + i) : v4u{0, 0, 0, 0};
    }
#pragma unroll
    for (uint32_t j = 0; j < kInFlight; j++) sum += v[j].x + v[j].y + v[j].z + v[j].w;
  }
#pragma unroll
  for (uint32_t offset = 16; offset > 0; offset /= 2) sum += shfl_xor(sum, offset);
  if (lane_id() == 0) atom_add_relaxed(ptr<uint32_t>(p.dst), sum);
}

DEV uint64_t split_mix(uint64_t x) {
  x += 0x9E3779B97F4A7C15ull;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
  return x ^ (x >> 31);
}

/* No griddep_launch: what it writes are weights, which later launches read before they wait. */
template <class E>
DEV void bench_fill(const BenchParams& p) {
  griddep_wait();
  E* dst = ptr<E>(p.dst);
  for (uint64_t i = static_cast<uint64_t>(bid_x()) * kThreads + tid_x(); i < p.elements;
       i += static_cast<uint64_t>(nbid_x()) * kThreads) {
    const uint64_t word = split_mix(split_mix(p.seed) + i);
    const uint32_t sum = static_cast<uint32_t>(word & 0xffff) + static_cast<uint32_t>((word >> 16) & 0xffff) +
                         static_cast<uint32_t>((word >> 32) & 0xffff) + static_cast<uint32_t>(word >> 48);
    /* Four uniforms on 0..65535: mean 131070, standard deviation 65536 / sqrt(3). */
    const float normal = (static_cast<float>(sum) - 131070.0f) * (1.0f / 37837.0f);
    dst[i] = from_f32<E>(p.mean + p.deviation * normal);
  }
}

KERNEL(bench_fill_f32, BenchParams, kThreads, 8) { bench_fill<float>(p); }
KERNEL(bench_fill_bf16, BenchParams, kThreads, 8) { bench_fill<bf16>(p); }
