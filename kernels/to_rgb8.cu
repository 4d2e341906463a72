// rgb = rint(clamp(x / 2 + 0.5, 0, 1) * 255): decoder output to pixels.
//
//   x   [B, h, w, 3] E
//   rgb [B, h, w, 3] uint8     halves go to the even level; NaN becomes 0
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
  if (i >= p.elements) return;
  const float unit = f_min(f_max(to_f32(ptr<const E>(p.x)[i]) * 0.5f + 0.5f, 0.0f), 1.0f);
  ptr<uint8_t>(p.rgb)[i] = static_cast<uint8_t>(f_rint(unit * 255.0f));
}

KERNEL(to_rgb8_plain_f32, ToRgb8Params, 256, 8) { to_rgb8_plain<float>(p); }
KERNEL(to_rgb8_plain_bf16, ToRgb8Params, 256, 8) { to_rgb8_plain<bf16>(p); }
