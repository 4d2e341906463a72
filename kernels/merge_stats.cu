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
static constexpr int kBatch = 16;  // pairs of a thread that are on their way at once

KERNEL(merge_stats_plain, MergeStatsParams, 256, 2) {
  SMEM(float, scratch, kThreads / 32);
  griddep_launch();
  griddep_wait();
  const uint32_t group = bid_x(), image = bid_y(), group_channels = p.channels / p.groups;
  const uint32_t tiles_x = (p.width + kTileW - 1) / kTileW, tiles = (p.height + kTileH - 1) / kTileH * tiles_x;
  const float* partial =
      ptr<const float>(p.partial) + (static_cast<size_t>(image) * tiles * p.channels + group * group_channels) * 2;
  const float origin = partial[0];

  // Threads take the group's pairs in memory order, kThreads apart; (row, col) of the tile and the channel step along
  // without dividing.
  const uint32_t step = kThreads / group_channels, step_channels = kThreads % group_channels;
  const uint32_t step_rows = step / tiles_x, step_cols = step % tiles_x;
  const uint32_t first = tid_x() / group_channels;
  uint32_t row = first / tiles_x, col = first % tiles_x, channel = tid_x() % group_channels;
  float count = 0.0f, mean = 0.0f, m2 = 0.0f;
  while (row * tiles_x < tiles) {
    // A merge waits for the one before it; the loads do not.
    v2u pair[kBatch];
    float pixels[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; i++) {
      const uint32_t y = row * kTileH, x = col * kTileW;
      const uint32_t rows = y >= p.height ? 0 : p.height - y < kTileH ? p.height - y : kTileH;
      const uint32_t cols = p.width - x < kTileW ? p.width - x : kTileW;
      pixels[i] = static_cast<float>(rows * cols);
      pair[i] = {};
      if (rows)
        pair[i] = *reinterpret_cast<const v2u*>(
            partial + ((static_cast<size_t>(row) * tiles_x + col) * p.channels + channel) * 2);
      row += step_rows, col += step_cols, channel += step_channels;
      if (channel >= group_channels) channel -= group_channels, col++;
      if (col >= tiles_x) col -= tiles_x, row++;
    }
#pragma unroll
    for (int i = 0; i < kBatch; i++) {
      // Without a branch: a tile that is not there weighs nothing. Before the first pair count is 0 and so is its
      // weight.
      const float delta = as_f32(pair[i].x) - origin - mean;
      const float share = fast_div(pixels[i], f_max(count + pixels[i], 1.0f));
      mean = f_fma(delta, share, mean);
      m2 += as_f32(pair[i].y) + delta * delta * count * share;
      count += pixels[i];
    }
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
