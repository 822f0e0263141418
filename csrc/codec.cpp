#include "codec.h"

#include <dlfcn.h>

#include <cstring>
#include <memory>
#include <string>

#include "error.h"

namespace tiered_mem {
namespace {

// libzstd found at run time, so that building needs no headers and `none` needs no library.
struct Zstd {
  struct Context;
  Context* (*create_context)();
  size_t (*free_context)(Context*);
  size_t (*decompress)(Context*, void*, size_t, const void*, size_t);
  unsigned (*is_error)(size_t);
  const char* (*error_name)(size_t);

  Zstd() {
    void* library = dlopen("libzstd.so.1", RTLD_NOW | RTLD_LOCAL);
    if (!library) {
      throw StoreError(
          "this store is packed with zstd, and libzstd.so.1 is not on this machine: install it "
          "(Debian, Ubuntu: libzstd1; Fedora: libzstd), or pack again with codec none");
    }
    find(library, "ZSTD_createDCtx", create_context);
    find(library, "ZSTD_freeDCtx", free_context);
    find(library, "ZSTD_decompressDCtx", decompress);
    find(library, "ZSTD_isError", is_error);
    find(library, "ZSTD_getErrorName", error_name);
  }

  template <typename Function>
  static void find(void* library, const char* name, Function& function) {
    function = reinterpret_cast<Function>(dlsym(library, name));
    if (!function) throw StoreError(std::string("libzstd.so.1 lacks ") + name);
  }
};

const Zstd& zstd() {
  static const Zstd library;
  return library;
}

struct FreeContext {
  void operator()(Zstd::Context* context) const { zstd().free_context(context); }
};

void decompress(const void* stored, size_t stored_nbytes, void* raw, size_t raw_nbytes) {
  thread_local std::unique_ptr<Zstd::Context, FreeContext> context(zstd().create_context());
  const size_t got = zstd().decompress(context.get(), raw, raw_nbytes, stored, stored_nbytes);
  if (zstd().is_error(got)) {
    throw StoreError(std::string("a stored chunk does not decompress: ") + zstd().error_name(got));
  }
  if (got != raw_nbytes) {
    throw StoreError("a stored chunk decompresses to " + std::to_string(got) + " bytes where " +
                     std::to_string(raw_nbytes) + " were expected");
  }
}

void merge_planes(const unsigned char* planes, unsigned char* raw, size_t nbytes) {
  const size_t elements = nbytes / 2;
  const unsigned char* second = planes + elements;
  for (size_t i = 0; i < elements; ++i) {
    raw[2 * i] = planes[i];
    raw[2 * i + 1] = second[i];
  }
  if (nbytes % 2) raw[nbytes - 1] = planes[nbytes - 1];
}

}  // namespace

void decode(Codec codec, const void* stored, size_t stored_nbytes, void* raw, size_t raw_nbytes,
            Scratch& scratch) {
  switch (codec) {
    case Codec::none:
      if (stored_nbytes != raw_nbytes) throw StoreError("a plain chunk's sizes differ");
      std::memcpy(raw, stored, raw_nbytes);
      return;
    case Codec::zstd:
      decompress(stored, stored_nbytes, raw, raw_nbytes);
      return;
    case Codec::zstd_planes2: {
      std::byte* planes = scratch.planes.reserve(raw_nbytes);
      decompress(stored, stored_nbytes, planes, raw_nbytes);
      merge_planes(reinterpret_cast<const unsigned char*>(planes), static_cast<unsigned char*>(raw),
                   raw_nbytes);
      return;
    }
  }
  throw StoreError("unknown codec " + std::to_string(static_cast<int>(codec)));
}

}  // namespace tiered_mem
