// Function attributes of code that is compiled for the device by nvcc and for the host by any compiler.
#pragma once

#if defined(__CUDACC__)
/// Kernels and what they call: device code under nvcc, plain functions (the emulation) elsewhere.
#define MOECALC_KERNEL __device__ __forceinline__
/// Called from both sides.
#define MOECALC_BOTH __host__ __device__ inline
#define MOECALC_UNROLL _Pragma("unroll")
/// Loops of unknown length whose loads should be in flight together.
#define MOECALC_UNROLL_4 _Pragma("unroll 4")
#else
#define MOECALC_KERNEL inline
#define MOECALC_BOTH inline
#define MOECALC_UNROLL
#define MOECALC_UNROLL_4
#endif
