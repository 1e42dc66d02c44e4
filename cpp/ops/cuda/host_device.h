// Function attributes of code that is compiled for the device by nvcc and for the host by any compiler.
#pragma once

#if defined(__CUDACC__)
/// Kernels and what they call: device code under nvcc, plain functions (the emulation) elsewhere.
#define MOECALC_KERNEL __device__ __forceinline__
/// Called from both sides.
#define MOECALC_BOTH __host__ __device__ inline
#define MOECALC_UNROLL _Pragma("unroll")
#else
#define MOECALC_KERNEL inline
#define MOECALC_BOTH inline
#define MOECALC_UNROLL
#endif
