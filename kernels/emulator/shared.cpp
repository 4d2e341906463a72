// Shared memory: one arena per block, every array by itself with a gap behind it. Under ASan all but the arrays is
// poisoned; else gaps are NaN, and looked at when the block has ended. Arrays start as NaN.
#include <stdlib.h>
#include <string.h>

#include "runtime.hpp"

namespace emu {
namespace {

constexpr unsigned char kGapByte = 0xff;

char* carve(Block* b, size_t bytes, size_t align) {
  const size_t offset = (b->used + align - 1) / align * align;
  if (offset + bytes + kSharedGap > kArenaBytes) return nullptr;
  b->used = offset + bytes + kSharedGap;
  char* p = b->shared + offset;
#if EMU_ASAN
  __asan_unpoison_memory_region(p, bytes);
#else
  memset(p + bytes, kGapByte, kSharedGap);
#endif
  if (runner->launch->options->poison) memset(p, 0xff, bytes);
  observe_shared_array(b, offset, bytes);
  return p;
}

bool gap_written(const char* gap) {
  for (size_t i = 0; i < kSharedGap; i++)
    if (static_cast<unsigned char>(gap[i]) != kGapByte) return true;
  return false;
}

char* static_array(Block* b, const void* key, size_t bytes, size_t align, Site site) {
  for (const StaticArray& a : b->statics)
    if (a.key == key) return a.p;
  b->static_bytes += bytes;
  if (b->static_bytes > kStaticSharedLimit)
    fail(site, "%zu bytes of static shared memory, above the %zu that nvcc accepts", b->static_bytes,
         kStaticSharedLimit);
  if (b->static_bytes + b->dynamic_bytes > kSharedLimit)
    fail(site, "%zu bytes of static and %zu of dynamic shared memory, above the limit of %zu", b->static_bytes,
         b->dynamic_bytes, kSharedLimit);
  char* p = carve(b, bytes, align < 128 ? 128 : align);
  if (!p) fail(site, "the emulated arena of shared memory is full");
  b->statics.push_back({key, p, bytes});
  return p;
}

}  // namespace

Block::Block() : shared(static_cast<char*>(aligned_alloc(1024, kArenaBytes))) {
  if (!shared) abort();
}

Block::~Block() {
#if EMU_ASAN
  __asan_unpoison_memory_region(shared, kArenaBytes);
#endif
  free(shared);
}

void shared_start(Block* b, size_t dynamic_bytes) {
#if EMU_ASAN
  __asan_poison_memory_region(b->shared, kArenaBytes);
#endif
  b->statics.clear();
  b->static_bytes = 0;
  b->used = kSharedGap;  // without dynamic memory its address is that of a gap
  b->dynamic_bytes = dynamic_bytes;
  if (dynamic_bytes) {
    b->used = 0;
    carve(b, dynamic_bytes, 1024);
  }
}

const char* shared_overrun(Block* b) {
#if !EMU_ASAN
  if (b->dynamic_bytes && gap_written(b->shared + b->dynamic_bytes)) return "its dynamic shared memory";
  for (const StaticArray& a : b->statics)
    if (gap_written(a.p + a.bytes)) return "a static shared array";
#endif
  return nullptr;
}

void* shared_dynamic() { return current()->block->shared; }

void* shared_static(const void* key, size_t bytes, size_t align, Site site) {
  return static_array(current()->block, key, bytes, align, site);
}

uint32_t shared_offset(const void* p, Site site) {
  const size_t offset = static_cast<size_t>(static_cast<const char*>(p) - current()->block->shared);
  if (offset >= kArenaBytes) fail(site, "%p is not an address in the block's shared memory", p);
  return static_cast<uint32_t>(offset);
}

// Static arrays may have been touched first in another order there, so they are found by key.
void* cluster_map(const void* p, uint32_t rank, Site site) {
  Fiber* f = current();
  const uint32_t offset = shared_offset(p, site);
  if (rank >= f->cluster_size) fail(site, "cluster_map: rank %u in a cluster of %u blocks", rank, f->cluster_size);
  Block* peer = runner->blocks[rank];
  if (peer->live == 0) fail(site, "cluster_map: block %u of the cluster has exited", rank);
  for (const StaticArray& a : f->block->statics) {
    const size_t inside = static_cast<size_t>(static_cast<const char*>(p) - a.p);
    if (inside < a.bytes) return static_array(peer, a.key, a.bytes, 128, site) + inside;
  }
  if (offset >= f->block->dynamic_bytes) fail(site, "cluster_map: %p is in no shared array", p);
  return peer->shared + offset;
}

}  // namespace emu
