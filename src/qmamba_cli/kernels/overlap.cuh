// The two halves of programmatic dependent launch, for kernels that are launched with `overlap`. Without it, and before
// compute capability 9.0, both do nothing.
#ifndef QM_OVERLAP_CUH
#define QM_OVERLAP_CUH

// Lets the next kernel of the stream start while this one runs; it still waits in `wait_for_producers`.
__device__ __forceinline__ void release_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Waits until every kernel before this one has finished and its writes are visible. Before it a kernel reads
// constants only; what a kernel wrote may be read, and any buffer written, only after it.
__device__ __forceinline__ void wait_for_producers() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

#endif
