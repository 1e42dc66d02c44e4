// Instructions of the tensor cores (mma.sync), their fragments and the rounding of their factors.
//
// What a lane loads is a function of its number, written once for both targets. On the device a lane holds
// its own fragment. On the host it collects the fragments of all lanes whose factors reach its sums, with
// the same function: an element that a lane of the device would load from a wrong place is wrong here too.
//
// Lane 4 g + q has factors of rows g and g + 8, and of column g of the weights. Of every 8 inputs it has
// 2 q and 2 q + 1. To m16n8k8 these are inputs q and q + 4: any order will do that rows and weights share.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "kernels/common/host_device.h"
#include "kernels/cuda/formats.cuh"
#include "kernels/cuda/vector.cuh"

namespace moecalc::cuda::tensor_core {

/// A lane's factors from rows: the registers a0 to a3 of mma.sync, of each part.
template <class Format>
struct RowWords {
  uint32_t part[Format::kParts][4];
};
/// From weights: b0 and b1, of each part.
template <class Format>
struct alignas(Format::kLaneWords * 4) WeightWords {
  uint32_t part[Format::kParts][2];
};

#if defined(__CUDACC__)

template <class Format>
using RowFragments = RowWords<Format>;
template <class Format>
using WeightFragments = WeightWords<Format>;

template <class Format, class F>
__device__ __forceinline__ RowWords<Format> of_rows(int lane, const F& load) {
  return load(lane);
}
template <class Format, class F>
__device__ __forceinline__ WeightWords<Format> of_weights(int lane, const F& load) {
  return load(lane);
}

/// Two numbers of 16 bits in one register: the lower half is the first.
__device__ __forceinline__ uint32_t bf16_pair(float first, float second) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  return pair;
}
__device__ __forceinline__ uint32_t fp16_pair(float first, float second) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  return pair;
}

#define MOECALC_MMA(SHAPE, TYPE)                                            \
  asm volatile("mma.sync.aligned." SHAPE ".row.col.f32." TYPE "." TYPE      \
               ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};" \
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])             \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))

/// c += a b: of one part of the rows with one of the weights.
template <class Format>
__device__ __forceinline__ void add_part(float* c, const RowWords<Format>& rows,
                                         const WeightWords<Format>& weights, int of_rows, int of_weights) {
  const uint32_t (&a)[4] = rows.part[of_rows];
  const uint32_t (&b)[2] = weights.part[of_weights];
  if constexpr (Format::kBlockRows == 8) {
    MOECALC_MMA("m16n8k8", "tf32");
  } else if constexpr (std::is_same_v<Format, Bf16x3>) {
    MOECALC_MMA("m16n8k16", "bf16");
  } else {
    MOECALC_MMA("m16n8k16", "f16");
  }
}
#undef MOECALC_MMA

#else

/// Number k of the factors that a lane and its three peers have in two registers each. word(peer, register).
/// PTX ISA: m16n8k8 has k % 4 by lane and k / 4 by register, m16n8k16 two neighbors in one register of every
/// lane.
template <class Format, class F>
float factor_of(int k, const F& word) {
  if constexpr (Format::kBlockRows == 8) {
    return float_of(word(k % 4, k / 4));
  } else {
    const uint32_t pair = word(k % 8 / 2, k / 8);
    const uint32_t half = k % 2 == 1 ? pair >> 16 : pair & 0xffffu;
    return std::is_same_v<Format, Fp16> ? fp16_value(half) : float_of(half << 16);
  }
}

/// The factors of two rows, or of two columns of weights, that reach a lane's sums.
template <class Format>
struct Factors {
  float of[Format::kParts][2][Format::kBlockRows];
};
template <class Format>
using RowFragments = Factors<Format>;
template <class Format>
using WeightFragments = Factors<Format>;

/// From the four lanes that share rows g and g + 8. PTX ISA: a0 a2 are of row g, a1 a3 of row g + 8.
template <class Format, class F>
Factors<Format> of_rows(int lane, const F& load) {
  RowWords<Format> words[4];
  for (int peer = 0; peer < 4; ++peer) words[peer] = load(lane / 4 * 4 + peer);
  Factors<Format> factors;
  for (int part = 0; part < Format::kParts; ++part) {
    for (int side = 0; side < 2; ++side) {
      for (int k = 0; k < Format::kBlockRows; ++k) {
        factors.of[part][side][k] = factor_of<Format>(
            k, [&](int peer, int place) { return words[peer].part[part][side + 2 * place]; });
      }
    }
  }
  return factors;
}
/// From the eight lanes that hold the two columns of a lane's sums.
template <class Format, class F>
Factors<Format> of_weights(int lane, const F& load) {
  Factors<Format> factors;
  for (int column = 0; column < 2; ++column) {
    WeightWords<Format> words[4];
    for (int peer = 0; peer < 4; ++peer) words[peer] = load((lane % 4 * 2 + column) * 4 + peer);
    for (int part = 0; part < Format::kParts; ++part) {
      for (int k = 0; k < Format::kBlockRows; ++k) {
        factors.of[part][column][k] =
            factor_of<Format>(k, [&](int peer, int place) { return words[peer].part[part][place]; });
      }
    }
  }
  return factors;
}

inline uint32_t bf16_pair(float first, float second) {
  return bits_of(to_bf16(first)) >> 16 | (bits_of(to_bf16(second)) & 0xffff0000u);
}
inline uint32_t fp16_pair(float first, float second) {
  return fp16_bits(first) | static_cast<uint32_t>(fp16_bits(second)) << 16;
}

/// The largest float that is no larger in size, as tensor cores end a sum; what overflows is infinite.
inline float towards_zero(double sum) {
  const float nearest = static_cast<float>(sum);
  const bool beyond = std::isfinite(nearest) && std::abs(static_cast<double>(nearest)) > std::abs(sum);
  return beyond ? float_of(bits_of(nearest) - 1) : nearest;
}

/// c += a b: c0 c1 are columns 2 q, 2 q + 1 of row g, c2 c3 those of row g + 8 (PTX ISA).
template <class Format>
void add_part(float* c, const Factors<Format>& rows, const Factors<Format>& weights, int of_rows,
              int of_weights) {
  for (int sum = 0; sum < 4; ++sum) {
    const float* a = rows.of[of_rows][sum / 2];
    const float* b = weights.of[of_weights][sum % 2];
    double total = c[sum];
    for (int k = 0; k < Format::kBlockRows; ++k) {
      total += static_cast<double>(a[k]) * static_cast<double>(b[k]);
    }
    c[sum] = towards_zero(total);
  }
}

#endif

constexpr uint32_t kTf32Bits = 0xffffe000u;

/// Nearest tf32, as to_tf32(): two instructions, where cvt.rna.tf32.f32 takes four. The device's NaN
/// (0x7fffffff) is the larger of both.
MOECALC_KERNEL uint32_t rounded_tf32(float value) {
  const uint32_t bits = bits_of(value);
  const auto up = static_cast<int32_t>(bits + 0x1000u);
  return static_cast<uint32_t>(up > static_cast<int32_t>(bits) ? up : static_cast<int32_t>(bits)) & kTf32Bits;
}
/// The nearest tf32 and what remains, of which the last bit is cut off. NaN may get lost in the first, but
/// not in the second.
MOECALC_KERNEL void split_tf32(float value, uint32_t& high, uint32_t& low) {
  high = (bits_of(value) + 0x1000u) & kTf32Bits;
  low = bits_of(value - float_of(high)) & kTf32Bits;
}

/// Puts two factors of a row into register `place`; m16n8k8 has the second one in register place + 2.
template <class Format>
MOECALC_KERNEL void put_factors(RowWords<Format>& to, int place, float first, float second) {
  if constexpr (std::is_same_v<Format, Fp16>) {
    to.part[0][place] = fp16_pair(first, second);
  } else if constexpr (std::is_same_v<Format, Bf16x3>) {
    const uint32_t high = bf16_pair(first, second);
    to.part[0][place] = high;
    to.part[1][place] = bf16_pair(first - float_of(high << 16), second - float_of(high & 0xffff0000u));
  } else if constexpr (std::is_same_v<Format, Tf32x3>) {
    split_tf32(first, to.part[0][place], to.part[1][place]);
    split_tf32(second, to.part[0][place + 2], to.part[1][place + 2]);
  } else {
    to.part[0][place] = rounded_tf32(first);
    to.part[0][place + 2] = rounded_tf32(second);
  }
}

/// A lane's factors from rows; `rows`: row 0 of 16, column 0 of a block.
template <class Format>
MOECALC_KERNEL RowWords<Format> load_rows(const float* rows, int stride, int lane) {
  using Pair = Vec<float, 2>;
  const float* from = rows + lane / 4 * stride + lane % 4 * 2;
  RowWords<Format> words;
  MOECALC_UNROLL
  for (int column = 0; column < Format::kBlockRows; column += 8) {
    const Pair upper = load<Pair>(from + column);
    const Pair lower = load<Pair>(from + 8 * stride + column);
    put_factors<Format>(words, column / 4, upper[0], upper[1]);
    put_factors<Format>(words, column / 4 + 1, lower[0], lower[1]);
  }
  return words;
}

/// The products that a format takes: numbers of the parts of rows and of weights, small terms first.
struct Product {
  int of_rows;
  int of_weights;
};
template <class Format>
constexpr int kProducts = Format::kParts == 2 ? 3 : 1;
template <class Format>
MOECALC_KERNEL constexpr Product product_of(int number) {
  constexpr bool is_split = Format::kParts == 2;
  return {is_split && number == 1, is_split && number == 0};
}

/// Whether the products of a block of inputs are summed on their own, and then added as any float32 is.
/// Tensor cores were found to cut a sum off towards zero and not to round it: over many inputs that is
/// several times the error of float32.
template <class Format>
constexpr bool kSumsBlocks = std::is_same_v<Format, Tf32x3>;

}  // namespace moecalc::cuda::tensor_core
