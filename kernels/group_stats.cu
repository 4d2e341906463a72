// stats[b, g, :] = mean and 1 / sqrt(var + eps) over the pixels and channels of group g: GroupNorm's statistics.
//
//   x     [B, P, C] E              channels last; group g is channels [g * C/groups, (g + 1) * C/groups)
//   stats [B, groups, 2] float     applied by conv2d while it loads x
//
// Precision: float, never E[x^2] - E[x]^2. A thread takes 8 values at a time, finds their mean and the sum of squared
// deviations from it (M2), and merges the pair into its running one (Chan); the block then merges its threads the same
// way. All of it is relative to the group's first value, so that a mean far from zero costs no digits. The order of
// additions depends on the shape alone, so the result is the same every time.
//
// Bound: bytes. One read of x: 67 MB for a 512x512x128 activation in bf16.
//
// variant plain: grid (groups, images), 256 threads. A group is one block however large the picture is, so the 32
// groups of one image leave most of a GPU idle at high resolutions; splitting a group needs a second pass.
#include "dev.cuh"

static constexpr uint32_t kThreads = 256;
static constexpr int kBatch = 8;  // values per merge: one division for all of them

template <class E>
DEV void group_stats_plain(const GroupStatsParams& p, float* scratch) {
  griddep_launch();
  griddep_wait();
  const uint32_t group = bid_x(), image = bid_y(), group_channels = p.channels / p.groups;
  const E* x = ptr<const E>(p.x) + static_cast<size_t>(image) * p.pixels * p.channels + group * group_channels;

  const float origin = to_f32(x[0]);

  // Threads take the group's values in memory order, kThreads apart; (pixel, channel) steps along without dividing.
  const uint32_t step_pixels = kThreads / group_channels, step_channels = kThreads % group_channels;
  uint32_t pixel = tid_x() / group_channels, channel = tid_x() % group_channels;
  float count = 0.0f, mean = 0.0f, m2 = 0.0f;
  while (pixel < p.pixels) {
    float v[kBatch], sum = 0.0f;
    int n = 0;
    for (int i = 0; i < kBatch; i++) {
      const bool known = pixel < p.pixels;
      v[i] = known ? to_f32(x[static_cast<size_t>(pixel) * p.channels + channel]) - origin : 0.0f;
      sum += v[i];
      n += known;
      pixel += step_pixels, channel += step_channels;
      if (channel >= group_channels) channel -= group_channels, pixel++;
    }
    const float batch_count = static_cast<float>(n), batch_mean = sum / batch_count;
    float batch_m2 = 0.0f;
    for (int i = 0; i < kBatch; i++) {
      const float d = v[i] - batch_mean;
      if (i < n) batch_m2 = f_fma(d, d, batch_m2);
    }
    const float delta = batch_mean - mean, share = batch_count / (count + batch_count);
    mean = f_fma(delta, share, mean);
    m2 += batch_m2 + delta * delta * count * share;
    count += batch_count;
  }

  const float total = static_cast<float>(p.pixels) * static_cast<float>(group_channels);
  const float group_mean = block_sum(count * mean, scratch) / total;
  const float d = mean - group_mean;
  const float variance = block_sum(f_fma(count * d, d, m2), scratch) / total;
  if (tid_x() == 0) {
    float* stats = ptr<float>(p.stats) + (image * p.groups + group) * 2;
    stats[0] = origin + group_mean;
    stats[1] = 1.0f / f_sqrt(variance + p.eps);
  }
}

KERNEL(group_stats_plain_f32, GroupStatsParams, 256, 4) {
  SMEM(float, scratch, kThreads / 32);
  group_stats_plain<float>(p, scratch);
}
KERNEL(group_stats_plain_bf16, GroupStatsParams, 256, 4) {
  SMEM(float, scratch, kThreads / 32);
  group_stats_plain<bf16>(p, scratch);
}
