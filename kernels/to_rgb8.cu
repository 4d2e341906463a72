// rgb = rint(clamp(x / 2 + 0.5, 0, 1) * 255): decoder output to pixels.
//
//   x   [B, h, w, 3] E
//   rgb [B, h, w, 3] uint8     halves go to the even level; NaN becomes 0
//   bad [ceil(n / 32)] uint32  a bit per value that is not finite, so that nobody takes its level for a picture
//
// Rounding: x is widened first and everything is float, as the official code does it (it converts to float before
// scaling; doing the sum in bf16 would change one pixel in four).
//
// Bound: bytes, 0.8 M values at 512x512. variant plain: one value per thread, 256 threads.
#include "dev.cuh"

template <class E>
DEV void to_rgb8_plain(const ToRgb8Params& p) {
  griddep_launch();
  griddep_wait();
  const uint64_t i = static_cast<uint64_t>(bid_x()) * ntid_x() + tid_x();
  // Threads past the end stay for the ballot.
  const bool inside = i < p.elements;
  const float x = inside ? to_f32(ptr<const E>(p.x)[i]) : 0.0f;
  const uint32_t bad = warp_ballot(!is_finite(x));
  if (!inside) return;
  if (lane_id() == 0) ptr<uint32_t>(p.bad)[i / 32] = bad;
  const float unit = f_min(f_max(x * 0.5f + 0.5f, 0.0f), 1.0f);
  ptr<uint8_t>(p.rgb)[i] = static_cast<uint8_t>(f_rint(unit * 255.0f));
}

KERNEL(to_rgb8_plain_f32, ToRgb8Params, 256, 8) { to_rgb8_plain<float>(p); }
KERNEL(to_rgb8_plain_bf16, ToRgb8Params, 256, 8) { to_rgb8_plain<bf16>(p); }
