// When a decode kernel takes its turn, and how it hands on; include decode_ptx.cuh first.
#ifndef QM_DECODE_TURN_CUH
#define QM_DECODE_TURN_CUH

// Two ways to wait for the kernel before. By its end (`before` is null): every block has left and its writes are
// flushed. By count: every block has counted itself after its last write, which is known about a microsecond sooner;
// the end is then waited for at the own end, so that a kernel's end means the end of all before it.
//
// Counters have two sets, taken in turn by the blocks of a model; decode_scan clears the set of the block before.
// Why no kernel meets an old count: `late` kernels (decode_in, which waits for the whole block before it) let their
// successors start only after their own wait, so while any kernel of block i runs, all work before block i is done.
constexpr int COUNTER_STRIDE = 32;  // words from one counter to the next: a line each

struct Turn {
  const int* before;  // counter of the kernel before this one, or null
  int full;           // blocks of that kernel
  int* mine;          // counter of this kernel, or null
  int late;           // the next kernel may start after this one's wait, not at once
};

__device__ __forceinline__ void announce(const Turn& turn) {
  if (!turn.late) release_dependents();
}

__device__ __forceinline__ void await_turn(const Turn& turn) {
  if (turn.before == nullptr) {
    wait_for_producers();
  } else {
    if (threadIdx.x == 0) wait_for_blocks(turn.before, turn.full);
    __syncthreads();
  }
  if (turn.late) release_dependents();
}

// After the last write that another kernel of this token reads.
__device__ __forceinline__ void hand_on(const Turn& turn) {
  if (turn.mine != nullptr) {
    __syncthreads();
    if (threadIdx.x == 0) count_block(turn.mine);
  }
}

// The last thing a kernel does.
__device__ __forceinline__ void end_turn(const Turn& turn) {
  if (turn.before != nullptr) wait_for_producers();
}

// Benchmarks compile with DECODE_STAMPS: the cycle at which thread 0 of a block passed each place of a kernel, and
// behind them the device's time at the first, second and last one.
#ifdef DECODE_STAMPS
__device__ long long decode_stamps[6][128][16];
#define STAMP(kernel, place)                                                                            \
  if (threadIdx.x == 0 && blockIdx.x < 128 && blockIdx.y == 0) {                                         \
    decode_stamps[kernel][blockIdx.x][place] = cycles();                                                 \
    decode_stamps[kernel][blockIdx.x][(place) == 0 ? 13 : (place) == 1 ? 14 : 15] = nanoseconds();       \
  }
#else
#define STAMP(kernel, place)
#endif

#endif
