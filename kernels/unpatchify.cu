// latent[b, y, x, c] = E(tokens[b, t, k] / scale + shift): image tokens to the VAE's latent.
//
//   tokens [B, T, K] E        T = (h / p) * (w / p) in raster order, K = C * p * p
//   latent [B, h, w, C] E     t = (y / p) * (w / p) + x / p, k = c * p * p + (y % p) * p + x % p
//
// Rounding: once, after the shift. Bound: latency; 65,536 values for a 512x512 picture.
// variant plain: one value of the latent per thread, 256 threads.
#include "dev.cuh"

template <class E>
DEV void unpatchify_plain(const UnpatchifyParams& p) {
  griddep_launch();
  griddep_wait();
  const uint32_t pixels = p.height * p.width, tokens_x = p.width / p.patch, area = p.patch * p.patch;
  const uint64_t i = static_cast<uint64_t>(bid_x()) * ntid_x() + tid_x();
  if (i >= static_cast<uint64_t>(p.images) * pixels * p.channels) return;
  const uint32_t c = i % p.channels;
  const uint64_t pixel = i / p.channels;
  const uint32_t image = pixel / pixels, y = pixel % pixels / p.width, x = pixel % p.width;
  const uint64_t token = static_cast<uint64_t>(image) * (pixels / area) + y / p.patch * tokens_x + x / p.patch;
  const uint64_t k = c * area + y % p.patch * p.patch + x % p.patch;
  const float v = to_f32(ptr<const E>(p.tokens)[token * (p.channels * area) + k]);
  ptr<E>(p.latent)[i] = from_f32<E>(v / p.scale + p.shift);
}

KERNEL(unpatchify_plain_f32, UnpatchifyParams, 256, 4) { unpatchify_plain<float>(p); }
KERNEL(unpatchify_plain_bf16, UnpatchifyParams, 256, 4) { unpatchify_plain<bf16>(p); }
