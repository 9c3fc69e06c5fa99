// Barriers in shared memory that count the bytes of copies, and the copies that they count. Hopper and newer; nothing
// here may be called elsewhere. Addresses are those of `shared_address`.
#ifndef QM_BARRIERS_CUH
#define QM_BARRIERS_CUH

__device__ __forceinline__ unsigned int shared_address(const void* p) {
  return static_cast<unsigned int>(__cvta_generic_to_shared(p));
}

__device__ __forceinline__ void init_barrier(unsigned int barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
// The barriers that this thread made become visible to the copies of tiles.
__device__ __forceinline__ void publish_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
// Barriers of a ring of stages, made by one thread: a phase of `full` is one arrival with its copies, of `empty` so many
// arrivals. The block meets before it uses them.
template <int STAGES>
__device__ __forceinline__ void make_ring(unsigned int full, unsigned int empty, int arrivals) {
  for (int i = 0; i < STAGES; i++) {
    init_barrier(full + 8 * i, 1);
    init_barrier(empty + 8 * i, arrivals);
  }
  publish_barriers();
}
__device__ __forceinline__ void arrive(unsigned int barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// Arrives, and lets the phase wait for so many bytes of copies.
__device__ __forceinline__ void arrive_expecting(unsigned int barrier, unsigned int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// Waits for the end of the phase of this parity.
__device__ __forceinline__ void wait_for(unsigned int barrier, unsigned int parity) {
  asm volatile(
      "{\n.reg .pred done;\n"
      "again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// Copies bytes that lie together; their number and both addresses are multiples of 16.
__device__ __forceinline__ void copy_bytes(unsigned int to, const void* from, int bytes, unsigned int barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
               "l"(from), "r"(bytes), "r"(barrier)
               : "memory");
}

#endif
