// The count build: bytes that a launch reads and writes, in all and different ones, per piece of device memory.
#include "runtime.hpp"

#if EMU_COUNT

#include <stdlib.h>

#include <algorithm>

namespace emu {
namespace {

// One bit per byte of a piece; made when the piece is first touched. calloc maps zero pages lazily.
struct Bitmap {
  uint64_t* words = nullptr;
  ~Bitmap() { free(words); }

  // Sets `count` bits from `first` on and returns how many were clear.
  uint64_t set(uint64_t first, uint64_t count, uint64_t size) {
    if (!words) words = static_cast<uint64_t*>(calloc(size / 64 + 1, sizeof(uint64_t)));
    if (!words) abort();
    uint64_t fresh = 0;
    while (count) {
      const uint64_t bit = first % 64, n = std::min<uint64_t>(count, 64 - bit);
      const uint64_t mask = (n == 64 ? ~uint64_t{0} : (uint64_t{1} << n) - 1) << bit;
      uint64_t& word = words[first / 64];
      fresh += __builtin_popcountll(mask & ~word);
      word |= mask;
      first += n, count -= n;
    }
    return fresh;
  }
};

}  // namespace

struct LaunchObservations {
  WarpstepEmuPiece* pieces;
  size_t count;
  std::vector<Bitmap> read, written;
  // A thread's accesses mostly stay in the piece of the one before, or go back to the one before that.
  size_t last = 0, before_last = 0;

  bool holds(size_t i, uint64_t address) const {
    return i < count && pieces[i].start <= address && address < pieces[i].end;
  }

  // Index of the piece that holds `address`, or of the first one above it.
  size_t find(uint64_t address) {
    if (holds(last, address)) return last;
    if (holds(before_last, address)) {
      std::swap(last, before_last);
      return last;
    }
    const WarpstepEmuPiece* at = std::upper_bound(
        pieces, pieces + count, address, [](uint64_t a, const WarpstepEmuPiece& piece) { return a < piece.end; });
    before_last = last;
    return last = static_cast<size_t>(at - pieces);
  }
};

void observe_launch(Launch& l) {
  l.observations = std::make_shared<LaunchObservations>();
  LaunchObservations& seen = *l.observations;
  seen.pieces = l.request->pieces;
  seen.count = l.request->piece_count;
  seen.read.resize(seen.count);
  seen.written.resize(seen.count);
}

void observe(const void* p, size_t bytes, Access access, uint64_t) {
  const Fiber* f = current();
  if (!f || is_thread_state(f, p, *runner->launch->request) ||
      static_cast<size_t>(static_cast<const char*>(p) - f->block->shared) < kArenaBytes)
    return;
  LaunchObservations& seen = *runner->launch->observations;
  uint64_t from = reinterpret_cast<uint64_t>(p);
  const uint64_t to = from + bytes;
  for (size_t i = seen.find(from); i < seen.count && seen.pieces[i].start < to; i++) {
    WarpstepEmuPiece& piece = seen.pieces[i];
    from = std::max(from, piece.start);
    const uint64_t n = std::min(to, piece.end) - from, size = piece.end - piece.start;
    if (is_write(access)) {
      piece.written_bytes += n;
      piece.written_unique_bytes += seen.written[i].set(from - piece.start, n, size);
      if (!piece.may_write) piece.undeclared_bytes += n;
    } else {
      piece.read_bytes += n;
      piece.read_unique_bytes += seen.read[i].set(from - piece.start, n, size);
      // What a kernel writes it may read back.
      if (!piece.may_read && !piece.may_write) piece.undeclared_bytes += n;
    }
    from += n;
    if (from == to) break;
  }
}

void prefetch(const void* p, Site) {
  constexpr uint64_t kLine = 128;
  const uint64_t line = reinterpret_cast<uint64_t>(p) / kLine * kLine;
  LaunchObservations& seen = *runner->launch->observations;
  const size_t i = seen.find(reinterpret_cast<uint64_t>(p));
  if (seen.holds(i, reinterpret_cast<uint64_t>(p)) && !seen.pieces[i].may_read)
    observe(reinterpret_cast<const void*>(line), kLine, Access::kRead, 0);
}

void misaligned(const void* p, size_t bytes, uint64_t) { fail({}, "misaligned %zu-byte access at %p", bytes, p); }

void load_nc(void* out, const void* p, size_t bytes, Site site) {
  touch(p, bytes, Access::kRead, site);
  memcpy(out, p, bytes);
}

}  // namespace emu

#endif
