// Runs the decode kernels on a CPU: every CUDA thread is a coroutine, a barrier, a shuffle and a tensor-core product
// are places where it lets the others of its warp or block catch up. Blocks run one after the other.
//
// Copies behind a thread's back are made at the wait that must cover them, so that a missing wait shows. Launches are
// whole, so waiting for the end of the producers is only recorded, and a count of their blocks must be full at once;
// it is a thread's wait only, until a barrier of the block. Reads of shared memory that was not written find 0xcd.
#pragma once
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __restrict__
#define __align__(n)
#define __shared__
#define __launch_bounds__(...)

struct uint2 { unsigned int x, y; };
struct float2 { float x, y; };
struct int2 { int x, y; };
inline int2 make_int2(int x, int y) { return {x, y}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
struct alignas(16) uint4 { unsigned int x, y, z, w; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) int4 { int x, y, z, w; };
struct Index { int x = 0, y = 0, z = 0; };
inline uint2 make_uint2(unsigned int x, unsigned int y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned int x, unsigned int y, unsigned int z, unsigned int w) { return {x, y, z, w}; }

constexpr int SHARED_LIMIT = 227 * 1024, CANARY = 4096, STACK = 64 * 1024;
alignas(16) unsigned char shared[SHARED_LIMIT + CANARY];

namespace emulator {

struct Copy { void* to; const void* from; int group; };
struct Thread {
  ucontext_t context;
  std::vector<char> stack;
  int id = 0;
  bool done = false;
  bool waited = false;        // for the producers
  long barriers = 0;          // of the block
  long exchanges = 0;         // of the warp
  long meetings = 0;          // of some warps
  int group = 0;              // of copies, the open one
  std::deque<Copy> copies;
  std::deque<std::vector<std::function<void()>>> products;  // of groups of warps, that have begun
};
struct Warp { unsigned char slot[2][32][32]; };

std::vector<Thread> threads;
std::vector<Warp> warps;
ucontext_t scheduler;
Thread* current = nullptr;
Index block_index, block_size, grid_size;
std::function<void()> body;
bool failed = false;
bool counted = false;  // some thread of the block has seen the producers' count

inline void yield() { swapcontext(&current->context, &scheduler); }
inline void fail(const char* what) {
  if (!failed) std::fprintf(stderr, "emulator: %s (block %d, thread %d)\n", what, block_index.x, current->id);
  failed = true;
}

// Until all threads from `first` up to `last` have arrived as often as this one.
template <long Thread::* COUNT>
void meet(int first, int last) {
  const long mine = ++(current->*COUNT);
  for (;;) {
    bool all = true;
    for (int i = first; i < last; i++) {
      if (threads[i].*COUNT < mine) {
        if (threads[i].done) return fail("a thread left before a barrier");
        all = false;
      }
    }
    if (all) return;
    yield();
  }
}
inline int warp_first() { return current->id / 32 * 32; }
inline int warp_last() { return std::min(warp_first() + 32, static_cast<int>(threads.size())); }

template <typename T>
T exchange(T value, int from) {
  static_assert(sizeof(T) <= 32, "a slot");
  Warp& warp = warps[current->id / 32];
  const int side = current->exchanges & 1;
  std::memcpy(warp.slot[side][current->id % 32], &value, sizeof value);
  meet<&Thread::exchanges>(warp_first(), warp_last());
  T result;
  std::memcpy(&result, warp.slot[side][from], sizeof result);
  return result;
}

inline void finish_copies(int newest_group) {
  while (!current->copies.empty() && current->copies.front().group <= newest_group) {
    std::memcpy(current->copies.front().to, current->copies.front().from, 16);
    current->copies.pop_front();
  }
}

void entry() {
  body();
  finish_copies(current->group);
  current->done = true;
  swapcontext(&current->context, &scheduler);
}

// One launch; false where something was wrong.
inline bool run(Index grid, int block, int shared_bytes, std::function<void()> kernel) {
  body = std::move(kernel);
  block_size = {block, 1, 1};
  grid_size = grid;
  failed = shared_bytes > SHARED_LIMIT;
  if (failed) std::fprintf(stderr, "emulator: %d bytes of shared memory\n", shared_bytes);
  threads.resize(block);
  warps.resize((block + 31) / 32);
  for (int by = 0; by < grid.y && !failed; by++) {
    for (int bx = 0; bx < grid.x && !failed; bx++) {
      block_index = {bx, by, 0};
      counted = false;
      std::memset(shared, 0xcd, sizeof shared);
      for (int i = 0; i < block; i++) {
        Thread& t = threads[i];
        t.stack.resize(STACK);
        t.id = i;
        t.done = t.waited = false;
        t.barriers = t.exchanges = t.meetings = 0;
        t.group = 0;
        t.copies.clear();
        t.products.clear();
        getcontext(&t.context);
        t.context.uc_stack.ss_sp = t.stack.data();
        t.context.uc_stack.ss_size = t.stack.size();
        t.context.uc_link = nullptr;
        makecontext(&t.context, entry, 0);
      }
      for (bool left = true; left && !failed;) {
        left = false;
        for (Thread& t : threads) {
          if (t.done) continue;
          left = true;
          current = &t;
          swapcontext(&scheduler, &t.context);
        }
      }
      for (int i = shared_bytes; i < shared_bytes + CANARY && !failed; i++) {
        if (shared[i] != 0xcd) fail("a write behind the shared memory that was asked for");
      }
    }
  }
  return !failed;
}

}  // namespace emulator

#define threadIdx (emulator::Index_of_thread())
#define blockIdx (emulator::block_index)
#define blockDim (emulator::block_size)
#define gridDim (emulator::grid_size)
namespace emulator {
inline Index Index_of_thread() { return {current->id, 0, 0}; }
}

inline void __syncthreads() {
  emulator::meet<&emulator::Thread::barriers>(0, static_cast<int>(emulator::threads.size()));
  if (emulator::counted) emulator::current->waited = true;
}
inline void __syncwarp() { emulator::meet<&emulator::Thread::exchanges>(emulator::warp_first(), emulator::warp_last()); }
template <typename T>
T __shfl_xor_sync(unsigned int, T value, int mask) { return emulator::exchange(value, emulator::current->id % 32 ^ mask); }
template <typename T>
T __shfl_sync(unsigned int, T value, int from) { return emulator::exchange(value, from); }

inline unsigned int __reduce_max_sync(unsigned int, unsigned int value) {
  for (int mask = 16; mask > 0; mask /= 2) value = std::max(value, __shfl_xor_sync(0u, value, mask));
  return value;
}

template <typename T>
T atomicAdd(T* at, T value) { const T before = *at; *at += value; return before; }
template <typename T>
T atomicMax(T* at, T value) { const T before = *at; *at = before > value ? before : value; return before; }
inline int __dp4a(int a, int b, int sum) {
  for (int i = 0; i < 4; i++) sum += static_cast<int8_t>(a >> 8 * i) * static_cast<int8_t>(b >> 8 * i);
  return sum;
}
inline unsigned int __byte_perm(unsigned int a, unsigned int b, unsigned int selector) {
  const uint64_t both = static_cast<uint64_t>(b) << 32 | a;
  unsigned int word = 0;
  for (int i = 0; i < 4; i++) word |= static_cast<unsigned int>(both >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
  return word;
}
template <typename T>
T min(T a, T b) { return a < b ? a : b; }
template <typename T>
T max(T a, T b) { return a < b ? b : a; }

// In the place of decode_ptx.cuh.
inline void release_dependents() {}
inline void wait_for_producers() { emulator::current->waited = true; }
inline void count_block(int* counter) { ++*counter; }
inline void wait_for_blocks(const int* counter, int full) {
  if (*counter != full) emulator::fail("a count of blocks that is not full");
  emulator::counted = true;
}
inline void tell(float* to, float value) { *to = value; }
inline float4 wait_for_four(const float4* from, unsigned int untold) {
  unsigned int seen[4];
  std::memcpy(seen, from, sizeof seen);
  for (unsigned int word : seen) {
    if (word == untold) emulator::fail("blocks that run one after the other cannot meet");
  }
  return *from;
}
inline void copy16(void* to, const void* from) {
  if (reinterpret_cast<uintptr_t>(to) % 16 || reinterpret_cast<uintptr_t>(from) % 16) emulator::fail("an unaligned copy");
  emulator::current->copies.push_back({to, from, emulator::current->group});
}
inline void commit_copies() { emulator::current->group++; }
inline void wait_for_older_copies() { emulator::finish_copies(emulator::current->group - 2); }
template <int COUNT>
void wait_for_all_but() { emulator::finish_copies(emulator::current->group - 1 - COUNT); }
inline void wait_for_copies() { emulator::finish_copies(emulator::current->group); }
inline void meet_threads(int, int threads) {
  const int first = emulator::current->id / threads * threads;
  emulator::meet<&emulator::Thread::meetings>(first, first + threads);
}
inline unsigned int pack_saturated(int a, int b, int c, int d) {
  const int values[4] = {a, b, c, d};
  unsigned int word = 0;
  for (int i = 0; i < 4; i++) {
    const int8_t byte = static_cast<int8_t>(std::min(127, std::max(-128, values[i])));
    word |= static_cast<unsigned int>(static_cast<uint8_t>(byte)) << 8 * i;
  }
  return word;
}
inline float divide_approx(float x, float y) { return x / y; }
inline void prefetch_line(const void*) {}
template <typename T>
T load_fresh(const T* p) {
  if (!emulator::current->waited) emulator::fail("a read before the producers are done");
  return *p;
}
inline float exp2_approx(float x) { return std::exp2(x); }
inline int __float2int_rn(float x) { return static_cast<int>(std::lrint(std::fmin(std::fmax(x, -2147483648.0f), 2147483520.0f))); }
inline float __frcp_rn(float x) { return 1.0f / x; }

struct Operands { unsigned int top_0, low_0, top_1, low_1, b_0, b_1; };
inline void multiply_i8(int (&sums)[4], unsigned int top_0, unsigned int low_0, unsigned int top_1, unsigned int low_1,
                        unsigned int b_0, unsigned int b_1) {
  const int lane = emulator::current->id % 32, g = lane / 4, q = lane % 4;
  for (int i = 0; i < 4; i++) {
    // Column 2 q + i % 2 of b is with the lanes 4 (2 q + i % 2) + k, row g (+ 8) of a with the lanes 4 g + k.
    emulator::Warp& warp = emulator::warps[emulator::current->id / 32];
    if (i == 0) emulator::exchange(Operands{top_0, low_0, top_1, low_1, b_0, b_1}, lane);
    const int side = (emulator::current->exchanges - 1) & 1;
    for (int k = 0; k < 4; k++) {
      Operands a, b;
      std::memcpy(&a, warp.slot[side][4 * g + k], sizeof a);
      std::memcpy(&b, warp.slot[side][4 * (2 * q + i % 2) + k], sizeof b);
      sums[i] = __dp4a(static_cast<int>(i < 2 ? a.top_0 : a.low_0), static_cast<int>(b.b_0), sums[i]);
      sums[i] = __dp4a(static_cast<int>(i < 2 ? a.top_1 : a.low_1), static_cast<int>(b.b_1), sums[i]);
    }
  }
}

// In the place of decode_wide_ptx.cuh: products read their operands at the wait for them, the last moment they may.
inline void publish_writes() {}
inline void begin_wide() { emulator::current->products.emplace_back(); }
inline void commit_wide() {}
template <int PENDING>
void wait_for_wide() {
  auto& groups = emulator::current->products;
  for (; groups.size() > PENDING; groups.pop_front()) {
    for (const auto& product : groups.front()) product();
  }
}
// A word of arrivals: the phase, how many a phase has, and how many are still to come.
struct Arrivals { uint16_t phase, all, left, unused; };
inline void begin_arrivals(unsigned long long* word, int count) {
  const Arrivals fresh{0, static_cast<uint16_t>(count), static_cast<uint16_t>(count), 0};
  std::memcpy(word, &fresh, sizeof fresh);
}
inline void end_arrivals(unsigned long long* word) { std::memset(word, 0xff, sizeof *word); }
inline void arrive(unsigned long long* word) {
  Arrivals& arrivals = *reinterpret_cast<Arrivals*>(word);
  if (--arrivals.left == 0) {
    arrivals.phase ^= 1;
    arrivals.left = arrivals.all;
  }
}
inline void arrive_after_copies(unsigned long long* word) {
  emulator::finish_copies(emulator::current->group);
  arrive(word);
}
inline void await_arrivals(const unsigned long long* word, int parity) {
  while (reinterpret_cast<const Arrivals*>(word)->phase == parity) emulator::yield();
}
template <int ROWS>
void multiply_wide(int (&sums)[ROWS / 2], const uint4* a, const uint4* b) {
  const int warp = emulator::current->id / 32 % 4, lane = emulator::current->id % 32;
  emulator::current->products.back().push_back([&sums, a, b, warp, lane] {
    // Piece of a row of 64 bytes, among eight of them.
    auto piece = [](const uint4* rows, int row, int at) {
      return reinterpret_cast<const int*>(rows + row * 4 + (at ^ row / 2 % 4));
    };
    for (int i = 0; i < ROWS / 2; i++) {
      const int token = 16 * warp + lane / 4 + i / 2 % 2 * 8, row = i / 4 * 8 + lane % 4 * 2 + i % 2;
      for (int at = 0; at < 4; at++) {
        for (int word = 0; word < 4; word++) sums[i] = __dp4a(piece(a, token, at)[word], piece(b, row, at)[word], sums[i]);
      }
    }
  });
}
