// What kernels instrumented by -fsanitize=thread call at every memory access. That sanitizer's own library is not
// linked; these definitions stand in for it and hand the access to race.cpp or count.cpp.
#include "runtime.hpp"

#if EMU_OBSERVED

namespace emu {
namespace {

// A thread's own variables are where the host's compiler puts them: it copies a struct of two words by 16 bytes at
// once.
bool is_own(const void* p) {
  const Fiber* f = current();
  return f && is_thread_state(f, p, *runner->launch->request);
}

inline void observe_aligned(const void* p, size_t bytes, Access access, uint64_t origin) {
  if (self && reinterpret_cast<uintptr_t>(p) % bytes && !is_own(p)) misaligned(p, bytes, origin);
  observe(p, bytes, access, origin);
}

}  // namespace
}  // namespace emu

#define ORIGIN reinterpret_cast<uint64_t>(__builtin_return_address(0))
// The plain hooks promise alignment, which a GPU enforces and x86 mostly does not.
#define HOOKS(n)                                                                             \
  void __tsan_read##n(void* p) { emu::observe_aligned(p, n, emu::Access::kRead, ORIGIN); }   \
  void __tsan_write##n(void* p) { emu::observe_aligned(p, n, emu::Access::kWrite, ORIGIN); } \
  void __tsan_unaligned_read##n(void* p) { emu::observe(p, n, emu::Access::kRead, ORIGIN); } \
  void __tsan_unaligned_write##n(void* p) { emu::observe(p, n, emu::Access::kWrite, ORIGIN); }

extern "C" {
HOOKS(1)
HOOKS(2)
HOOKS(4)
HOOKS(8)
HOOKS(16)
void __tsan_read_range(void* p, size_t n) { emu::observe(p, n, emu::Access::kRead, ORIGIN); }
void __tsan_write_range(void* p, size_t n) { emu::observe(p, n, emu::Access::kWrite, ORIGIN); }
void* __tsan_memcpy(void* to, const void* from, size_t n) {
  emu::observe(from, n, emu::Access::kRead, ORIGIN);
  emu::observe(to, n, emu::Access::kWrite, ORIGIN);
  return memcpy(to, from, n);
}
void* __tsan_memset(void* to, int byte, size_t n) {
  emu::observe(to, n, emu::Access::kWrite, ORIGIN);
  return memset(to, byte, n);
}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}
}

namespace emu {

// Sites travel through `origin` too: a user-space address has 47 bits, so the top bit is free to tell them apart.
uint64_t pack_site(Site s) {
  return uint64_t{1} << 63 | static_cast<uint64_t>(s.line & 0xffff) << 47 | reinterpret_cast<uint64_t>(s.file);
}

void touch(const void* p, size_t bytes, Access access, Site site) { observe(p, bytes, access, pack_site(site)); }

void observe_read(const void* p, size_t bytes, Site site) { touch(p, bytes, Access::kRead, site); }

}  // namespace emu

#endif
