// Kernels of the device: blocks and rows moved by threads, and expert ids turned into slots.
//
// One text for three compilers. nvcc makes an image of it when the package is built, NVRTC makes
// one where it runs, and a host compiler makes functions of it, which the tests and the driver's
// double run. So nothing is included on the device's side, and a kernel is a sequence of phases:
//
//   PHASE { what every thread of the block does }
//
// with a barrier behind each. On a host a phase is a loop over threadIdx.x. What stands outside of
// phases is the same for all threads of a block, and nothing but shared memory outlives a phase.
//
// Pointers are to memory that the device reaches: its own, or pinned host memory. Blocks of
// threads are whole warps in one dimension, of at most 512 threads, 1024 for remap_ids.

#ifdef __CUDACC__
#define KERNEL(max_threads) extern "C" __global__ void __launch_bounds__(max_threads)
#define DEVICE static __device__ __forceinline__
#define SHARED __shared__
#define PHASE for (bool once = true; once; once = false, __syncthreads())
#define UNROLL _Pragma("unroll")
#define NO_UNROLL _Pragma("unroll 1")
#define MAY_ALIAS
#else
#define KERNEL(max_threads) extern "C" void
#define DEVICE static inline
#define SHARED static thread_local
#define PHASE for (threadIdx.x = 0; threadIdx.x < blockDim.x; ++threadIdx.x)
#define UNROLL
#define NO_UNROLL
#define MAY_ALIAS __attribute__((may_alias))

struct Index {
  unsigned x;
};
static thread_local Index gridDim, blockDim, blockIdx, threadIdx;

static inline unsigned atomicAdd(unsigned* sum, unsigned number) {
  const unsigned before = *sum;
  *sum += number;
  return before;
}
#endif

typedef unsigned long long u64;
typedef long long i64;

struct CopyBlock {
  u64 target;
  u64 source;
  u64 nbytes;
};

struct MAY_ALIAS Word16 {
  alignas(16) u64 low;
  u64 high;
};
struct MAY_ALIAS Word8 {
  u64 bytes;
};
struct MAY_ALIAS Word4 {
  unsigned bytes;
};
struct MAY_ALIAS Word1 {
  char byte;
};

// What a warp copies at once: kNumInFlight words of 16 bytes a lane. A link with 2 us to and fro
// is full when a few dozen warps wait for so much.
constexpr unsigned kWarp = 32;
constexpr unsigned kNumInFlight = 8;
constexpr u64 kChunk = kWarp * kNumInFlight * 16;

constexpr unsigned kNumBlocks = 512;  // that stand in shared memory at a time

DEVICE unsigned this_thread() { return blockIdx.x * blockDim.x + threadIdx.x; }

template <typename Number>
DEVICE Number smaller(Number one, Number other) {
  return one < other ? one : other;
}

// Words of one size. Every load of a round is under way before the first store waits for one.
template <typename Word>
DEVICE void copy_words(char* target, const char* source, unsigned num_words, unsigned lane,
                       unsigned num_lanes) {
  Word* to = reinterpret_cast<Word*>(target);
  const Word* from = reinterpret_cast<const Word*>(source);
  NO_UNROLL
  for (unsigned first = lane; first < num_words; first += kNumInFlight * num_lanes) {
    Word words[kNumInFlight];
    UNROLL
    for (unsigned n = 0; n < kNumInFlight; ++n)
      if (first + n * num_lanes < num_words) words[n] = from[first + n * num_lanes];
    UNROLL
    for (unsigned n = 0; n < kNumInFlight; ++n)
      if (first + n * num_lanes < num_words) to[first + n * num_lanes] = words[n];
  }
}

// Words, after the bytes before the first aligned one and behind the last.
template <typename Word>
DEVICE void copy_aligned(char* target, const char* source, unsigned nbytes, unsigned lane,
                         unsigned num_lanes) {
  constexpr unsigned kWord = sizeof(Word);
  const unsigned head = smaller(unsigned(0 - reinterpret_cast<u64>(target)) % kWord, nbytes);
  const unsigned num_words = (nbytes - head) / kWord;
  const unsigned num_rest = nbytes - num_words * kWord;
  NO_UNROLL
  for (unsigned n = lane; n < num_rest; n += num_lanes) {
    const unsigned at = n < head ? n : n + num_words * kWord;
    target[at] = source[at];
  }
  copy_words<Word>(target + head, source + head, num_words, lane, num_lanes);
}

// To be called by all `num_lanes` lanes. Goes by the widest word to which both sides can be aligned
// at once.
DEVICE void copy_bytes(char* target, const char* source, unsigned nbytes, unsigned lane,
                       unsigned num_lanes) {
  const u64 apart = reinterpret_cast<u64>(target) ^ reinterpret_cast<u64>(source);
  if (apart % 16 == 0)
    copy_aligned<Word16>(target, source, nbytes, lane, num_lanes);
  else if (apart % 8 == 0)
    copy_aligned<Word8>(target, source, nbytes, lane, num_lanes);
  else if (apart % 4 == 0)
    copy_aligned<Word4>(target, source, nbytes, lane, num_lanes);
  else
    copy_words<Word1>(target, source, nbytes, lane, num_lanes);
}

// Copies blocks that don't overlap. Chunk c of block b falls to warp (b + c) % num_warps, so that
// one huge block spreads over all warps as well as a thousand small ones do. `blocks` is read once
// by every block of threads.
KERNEL(512) tiered_mem_copy_blocks(const CopyBlock* blocks, unsigned num_blocks) {
  SHARED CopyBlock tile[kNumBlocks];
  const unsigned num_warps = gridDim.x * blockDim.x / kWarp;
  for (unsigned start = 0; start < num_blocks; start += kNumBlocks) {
    const unsigned num_here = smaller(num_blocks - start, kNumBlocks);
    PHASE {
      for (unsigned n = threadIdx.x; n < num_here; n += blockDim.x) tile[n] = blocks[start + n];
    }
    PHASE {
      const unsigned lane = threadIdx.x % kWarp;
      unsigned chunk = (this_thread() / kWarp + num_warps - start % num_warps) % num_warps;
      for (unsigned n = 0; n < num_here; ++n) {
        const u64 nbytes = tile[n].nbytes;
        for (u64 at = chunk * kChunk; at < nbytes; at += num_warps * kChunk)
          copy_bytes(reinterpret_cast<char*>(tile[n].target) + at,
                     reinterpret_cast<const char*>(tile[n].source) + at,
                     unsigned(smaller(nbytes - at, kChunk)), lane, kWarp);
        chunk = chunk == 0 ? num_warps - 1 : chunk - 1;
      }
    }
  }
}

// How many lanes copy a row together: as many as it has words, so that a warp takes several of the
// rows that are too small for it.
DEVICE unsigned lanes_of(unsigned row_nbytes) {
  unsigned num_lanes = kWarp;
  while (num_lanes > 1 && num_lanes * 8 >= row_nbytes) num_lanes /= 2;
  return num_lanes;
}

// rows[n] = table[ids[n]]: `rows` is [num_rows, row_nbytes] without gaps, row r of the table begins
// at r * table_stride. A negative id leaves its row as it is.
KERNEL(512)
tiered_mem_gather_rows(char* rows, const char* table, const i64* ids, unsigned num_rows,
                       unsigned row_nbytes, u64 table_stride) {
  const unsigned num_lanes = lanes_of(row_nbytes);
  const unsigned num_at_once = gridDim.x * blockDim.x / num_lanes;
  PHASE {
    const unsigned lane = threadIdx.x % num_lanes;
    for (u64 row = this_thread() / num_lanes; row < num_rows; row += num_at_once) {
      if (ids[row] < 0) continue;
      copy_bytes(rows + row * row_nbytes, table + ids[row] * table_stride, row_nbytes, lane,
                 num_lanes);
    }
  }
}

// table[ids[n]] = rows[n], the reverse of the above. Ids are distinct: of two rows for one place,
// any bytes of either may stay.
KERNEL(512)
tiered_mem_scatter_rows(char* table, const char* rows, const i64* ids, unsigned num_rows,
                        unsigned row_nbytes, u64 table_stride) {
  const unsigned num_lanes = lanes_of(row_nbytes);
  const unsigned num_at_once = gridDim.x * blockDim.x / num_lanes;
  PHASE {
    const unsigned lane = threadIdx.x % num_lanes;
    for (u64 row = this_thread() / num_lanes; row < num_rows; row += num_at_once) {
      if (ids[row] < 0) continue;
      copy_bytes(table + ids[row] * table_stride, rows + row * row_nbytes, row_nbytes, lane,
                 num_lanes);
    }
  }
}

// Of tiered_mem_remap_ids: a tile of rows is what one block of threads places, a part of a tile
// what one thread counts, a bin a slot of the window or, behind these, what isn't in it.
constexpr unsigned kTile = 1024;
constexpr unsigned kNumParts = 16;
constexpr unsigned kMaxBins = 1024;

DEVICE unsigned bin_of(i64 id, const int* table, unsigned num_experts, int first_slot,
                       unsigned num_slots) {
  if (id < 0 || id >= num_experts) return num_slots;
  const int slot = table[id];
  return slot < first_slot || unsigned(slot - first_slot) >= num_slots ? num_slots
                                                                       : slot - first_slot;
}

// Sorts rows by the slot of their expert, stably, for a grouped matmul over the slots of a window,
// first_slot to first_slot + num_slots - 1, of which there are 1023 at most.
//
//   ids[num_rows]        the expert of each row
//   table[num_experts]   the slot of each expert, negative: it has none
//   order[num_rows]      the row that comes n-th
//   inverse[num_rows]    its inverse: where each row comes
//   tokens[num_rows]     order / top_k: the token whose row comes n-th, top_k rows being a token's
//   slots[num_rows]      the slot of the row that comes n-th, counted from first_slot
//   offs[num_slots]      how many rows come up to and with each slot
//
// Rows of experts that aren't in the window, and of ids that no expert has, come last with slot -1;
// offs doesn't count them. A counting sort: each block of threads counts all rows and places
// kTile of them, so it takes ceil(num_rows / kTile) blocks, 1 at least.
KERNEL(1024)
tiered_mem_remap_ids(const i64* ids, unsigned num_rows, const int* table, unsigned num_experts,
                     int first_slot, unsigned num_slots, unsigned top_k, i64* order, i64* inverse,
                     i64* tokens, int* slots, int* offs) {
  SHARED unsigned counts[2][kMaxBins];  // of all rows by bin; then of the bins up to it, too
  SHARED unsigned starts[kMaxBins];     // where the first row of this tile comes, by bin
  SHARED unsigned short parts[kNumParts][kMaxBins];  // rows by part and bin; then of parts before
  SHARED unsigned short bins[kTile];                 // by row of the tile
  SHARED unsigned short ranks[kTile];                // among the tile's rows of the same bin
  const unsigned num_bins = num_slots + 1;
  const unsigned first_row = blockIdx.x * kTile;
  const unsigned num_here = num_rows > first_row ? smaller(num_rows - first_row, kTile) : 0;
  const unsigned part_size = (num_here + kNumParts - 1) / kNumParts;

  PHASE {
    for (unsigned bin = threadIdx.x; bin < num_bins; bin += blockDim.x) {
      counts[0][bin] = starts[bin] = 0;
      for (unsigned part = 0; part < kNumParts; ++part) parts[part][bin] = 0;
    }
  }
  PHASE {
    for (unsigned row = threadIdx.x; row < num_rows; row += blockDim.x) {
      const unsigned bin = bin_of(ids[row], table, num_experts, first_slot, num_slots);
      atomicAdd(&counts[0][bin], 1);
      if (row < first_row)
        atomicAdd(&starts[bin], 1);
      else if (row - first_row < num_here)
        bins[row - first_row] = bin;
    }
  }
  PHASE {
    if (threadIdx.x >= kNumParts) continue;
    const unsigned end = smaller((threadIdx.x + 1) * part_size, num_here);
    for (unsigned row = threadIdx.x * part_size; row < end; ++row)
      ranks[row] = parts[threadIdx.x][bins[row]]++;
  }
  unsigned now = 0;
  for (unsigned distance = 1; distance < num_bins; distance *= 2, now = 1 - now) {
    PHASE {
      for (unsigned bin = threadIdx.x; bin < num_bins; bin += blockDim.x)
        counts[1 - now][bin] =
            counts[now][bin] + (bin < distance ? 0 : counts[now][bin - distance]);
    }
  }
  PHASE {
    for (unsigned bin = threadIdx.x; bin < num_bins; bin += blockDim.x) {
      if (blockIdx.x == 0 && bin < num_slots) offs[bin] = counts[now][bin];
      if (bin > 0) starts[bin] += counts[now][bin - 1];
      unsigned sum = 0;
      for (unsigned part = 0; part < kNumParts; ++part) {
        const unsigned number = parts[part][bin];
        parts[part][bin] = sum;
        sum += number;
      }
    }
  }
  PHASE {
    for (unsigned n = threadIdx.x; n < num_here; n += blockDim.x) {
      const unsigned bin = bins[n];
      const unsigned place = starts[bin] + parts[n / part_size][bin] + ranks[n];
      order[place] = first_row + n;
      inverse[first_row + n] = place;
      tokens[place] = (first_row + n) / top_k;
      slots[place] = bin < num_slots ? int(bin) : -1;
    }
  }
}

#ifndef __CUDACC__
#include <cstring>
#include <functional>
#include <tuple>

namespace {

// A launch whose arguments are copied, as the driver copies them.
template <typename... Arguments, std::size_t... N>
std::function<void()> bind_kernel(void (*kernel)(Arguments...), unsigned grid, unsigned block,
                                  void** parameters, std::index_sequence<N...>) {
  std::tuple<Arguments...> arguments{*static_cast<Arguments*>(parameters[N])...};
  return [=] {
    gridDim.x = grid;
    blockDim.x = block;
    for (blockIdx.x = 0; blockIdx.x < grid; ++blockIdx.x) std::apply(kernel, arguments);
  };
}

template <typename... Arguments>
std::function<void()> bind_kernel(void (*kernel)(Arguments...), unsigned grid, unsigned block,
                                  void** parameters) {
  return bind_kernel(kernel, grid, block, parameters, std::index_sequence_for<Arguments...>());
}

}  // namespace

/// A launch on the calling thread, by cuLaunchKernel's arguments; empty if no kernel has that name.
std::function<void()> tiered_mem_bind_kernel(const char* name, unsigned grid, unsigned block,
                                             void** parameters) {
#define TIERED_MEM_BIND(kernel) \
  if (std::strcmp(name, #kernel) == 0) return bind_kernel(kernel, grid, block, parameters)
  TIERED_MEM_BIND(tiered_mem_copy_blocks);
  TIERED_MEM_BIND(tiered_mem_gather_rows);
  TIERED_MEM_BIND(tiered_mem_scatter_rows);
  TIERED_MEM_BIND(tiered_mem_remap_ids);
#undef TIERED_MEM_BIND
  return {};
}
#endif
