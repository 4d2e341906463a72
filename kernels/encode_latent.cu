// tokens = E((sample - shift) * scale) in patches: the VAE encoder's moments to image tokens.
//
//   moments [h, w, 2C] E       per latent pixel C means, then C log variances
//   draw    [h, w, C] float    standard normal; absent: the sample is the mean
//   tokens  [T, K] E           T = (h / p) * (w / p) in raster order, K = C * p * p (kernels/unpatchify.cu)
//   mean, deviation, sample [h, w, C] E   optional: what tokens are made of, for verification
//
// mean: with psz every psz x psz patch of the means is normalised over its psz * psz * C values (biased variance, eps
// 1e-6, no affine). deviation = exp(clamp(log variance, -30, 20) / 2), sample = mean + deviation * draw;
// without a draw the posterior is its mean, and the deviation 0.
//
// Rounding: everything is float; each output is rounded to E once. The deviations are summed about the mean, in a
// second pass: a patch is 32 bytes of moments per pixel and stays in L1.
//
// Bound: latency; 131,072 moments for a 512x512 picture.
// variant plain: one warp per normalised patch (per latent pixel without psz), 4 warps per block.
#include "dev.cuh"

static constexpr uint32_t kWarps = 4;
static constexpr float kEps = 1e-6f;

template <class E>
DEV void encode_latent_plain(const EncodeLatentParams& p) {
  griddep_launch();
  griddep_wait();
  const uint32_t side = p.psz ? p.psz : 1, patches_x = p.width / side;
  const uint32_t patch = bid_x() * kWarps + tid_x() / 32, lane = tid_x() % 32;
  if (patch >= p.height / side * patches_x) return;
  const uint32_t y0 = patch / patches_x * side, x0 = patch % patches_x * side;
  const uint32_t values = side * side * p.channels;
  const E* moments = ptr<const E>(p.moments);

  // value i of the patch: pixels in raster order, channels innermost
  const auto pixel_of = [&](uint32_t i) {
    const uint32_t pixel = i / p.channels;
    return (y0 + pixel / side) * p.width + x0 + pixel % side;
  };
  const auto mean_of = [&](uint32_t i) {
    return to_f32(moments[static_cast<size_t>(pixel_of(i)) * 2 * p.channels + i % p.channels]);
  };
  float center = 0.0f, scale = 1.0f;
  if (p.psz) {
    const float count = static_cast<float>(values);
    float sum = 0.0f, squares = 0.0f;
    for (uint32_t i = lane; i < values; i += 32) sum += mean_of(i);
    center = warp_sum(sum) / count;
    for (uint32_t i = lane; i < values; i += 32) {
      const float d = mean_of(i) - center;
      squares = f_fma(d, d, squares);
    }
    scale = 1.0f / f_sqrt(warp_sum(squares) / count + kEps);
  }

  for (uint32_t i = lane; i < values; i += 32) {
    const uint32_t c = i % p.channels, pixel = pixel_of(i), y = pixel / p.width, x = pixel % p.width;
    const size_t at = static_cast<size_t>(pixel) * p.channels + c;
    const float mean = (mean_of(i) - center) * scale;
    const float log_variance = to_f32(moments[static_cast<size_t>(pixel) * 2 * p.channels + p.channels + c]);
    const float deviation = p.draw ? f_exp(0.5f * f_min(f_max(log_variance, -30.0f), 20.0f)) : 0.0f;
    const float sample = p.draw ? f_fma(deviation, ptr<const float>(p.draw)[at], mean) : mean;
    if (p.mean) ptr<E>(p.mean)[at] = from_f32<E>(mean);
    if (p.deviation) ptr<E>(p.deviation)[at] = from_f32<E>(deviation);
    if (p.sample) ptr<E>(p.sample)[at] = from_f32<E>(sample);
    const size_t token = static_cast<size_t>(y / p.patch) * (p.width / p.patch) + x / p.patch;
    const uint32_t k = (c * p.patch + y % p.patch) * p.patch + x % p.patch;
    ptr<E>(p.tokens)[token * p.channels * p.patch * p.patch + k] = from_f32<E>((sample - p.shift) * p.scale);
  }
}

KERNEL(encode_latent_plain_f32, EncodeLatentParams, 128, 4) { encode_latent_plain<float>(p); }
KERNEL(encode_latent_plain_bf16, EncodeLatentParams, 128, 4) { encode_latent_plain<bf16>(p); }
