// stats[b, g, :] = mean and 1 / sqrt(var + eps) over the pixels and channels of group g, from what conv2d's variant mma
// left of every tile: GroupNorm's statistics without another read of the activation.
//
//   partial [B, tiles of 8x16 pixels, C, 2] float   mean and sum of squared deviations (M2) of a channel over a tile
//   stats   [B, groups, 2] float                    as group_stats writes them
//
// Precision: pairs are merged as group_stats merges them (Chan), relative to the first one's mean. The order of
// additions depends on the shape alone.
//
// Bound: latency; 8 bytes per channel and 128 pixels. Grid (groups, images), 256 threads.
#include "dev.cuh"

static constexpr uint32_t kThreads = 256;
static constexpr uint32_t kTileH = 8, kTileW = 16;

KERNEL(merge_stats_plain, MergeStatsParams, 256, 4) {
  SMEM(float, scratch, kThreads / 32);
  griddep_launch();
  griddep_wait();
  const uint32_t group = bid_x(), image = bid_y(), group_channels = p.channels / p.groups;
  const uint32_t tiles_x = (p.width + kTileW - 1) / kTileW, tiles = (p.height + kTileH - 1) / kTileH * tiles_x;
  const float* partial = ptr<const float>(p.partial) +
                         (static_cast<size_t>(image) * tiles * p.channels + group * group_channels) * 2;
  const float origin = partial[0];

  const uint32_t step_tiles = kThreads / group_channels, step_channels = kThreads % group_channels;
  uint32_t tile = tid_x() / group_channels, channel = tid_x() % group_channels;
  float count = 0.0f, mean = 0.0f, m2 = 0.0f;
#pragma unroll 4
  while (tile < tiles) {
    const uint32_t y = tile / tiles_x * kTileH, x = tile % tiles_x * kTileW;
    const uint32_t rows = p.height - y < kTileH ? p.height - y : kTileH;
    const uint32_t cols = p.width - x < kTileW ? p.width - x : kTileW;
    const float* from = partial + (static_cast<size_t>(tile) * p.channels + channel) * 2;
    const float n = static_cast<float>(rows * cols), delta = from[0] - origin - mean, share = n / (count + n);
    mean = f_fma(delta, share, mean);
    m2 += from[1] + delta * delta * count * share;
    count += n;
    tile += step_tiles, channel += step_channels;
    if (channel >= group_channels) channel -= group_channels, tile++;
  }

  const float total = static_cast<float>(p.height * p.width) * static_cast<float>(group_channels);
  const float group_mean = block_sum(count * mean, scratch) / total;
  const float d = mean - group_mean;
  const float variance = block_sum(f_fma(count * d, d, m2), scratch) / total;
  if (tid_x() == 0) {
    float* stats = ptr<float>(p.stats) + (image * p.groups + group) * 2;
    stats[0] = origin + group_mean;
    stats[1] = 1.0f / f_sqrt(variance + p.eps);
  }
}
