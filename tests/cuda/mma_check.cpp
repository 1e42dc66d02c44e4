// Products of the tensor-core tiles, fragment by fragment, beside sums in double precision of the factors as
// rounded: prints a line per format, its name and the largest difference. The last line has what a factor
// beyond the range of fp16 gives.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <random>
#include <type_traits>
#include <vector>

#include "kernels/cuda/product.cuh"

using namespace moecalc::cuda;

namespace {

constexpr int kInputs = 48;
constexpr int kWeightColumns = 64;

struct alignas(64) Line {
  char bytes[64];
};

/// A factor as the format's product has it, apart from the remainder of what is split.
template <class Format>
double rounded(float factor) {
  if constexpr (std::is_same_v<Format, Tf32>) return to_tf32(factor);
  if constexpr (std::is_same_v<Format, Fp16>) return fp16_value(fp16_bits(factor));
  return factor;
}

template <class Format>
double exact(const SharedRows<Format>& rows, const std::vector<float>& weights, int row, int column) {
  double sum = 0;
  for (int input = 0; input < kInputs; ++input) {
    const float weight = weights[static_cast<size_t>(input * kWeightColumns + column)];
    sum += rounded<Format>(*rows.at(row, input)) * rounded<Format>(weight);
  }
  return sum;
}

/// A weight matrix and a tile of rows in shared memory.
template <class Format>
struct Operands {
  std::vector<float> weights = std::vector<float>(kInputs * kWeightColumns);
  std::vector<float> laid_out;
  int64_t bytes = SharedRows<Format>::bytes(kInputs);
  std::vector<Line> memory =
      std::vector<Line>(static_cast<size_t>(bytes + HostBlock::kRedZones) / sizeof(Line) + 1);
  HostBlock block = HostBlock(0, kThreads, memory.data()->bytes, bytes, false);
  SharedRows<Format> rows = SharedRows<Format>(block, kInputs);

  Operands() {
    std::mt19937 random(1);
    std::normal_distribution<float> normal;
    for (float& weight : weights) weight = normal(random);
    laid_out = fragments<Format>(weights.data(), kInputs, kWeightColumns);
    for (int row = 0; row < Format::kRows; ++row) {
      for (int input = 0; input < kInputs; ++input) *rows.at(row, input) = normal(random);
    }
  }
};

/// Largest error of a tile of which `width` columns count; what is in the others is not read.
template <class Tile>
double largest_error(int width) {
  using Format = typename Tile::Format;
  const Operands<Format> operands;
  double worst = 0;
  for (int thread = 0; thread < kThreads; ++thread) {
    typename Tile::Vector sums[Tile::kGroups] = {};
    Tile::multiply(thread, sums, operands.rows, kInputs, {operands.laid_out.data(), kWeightColumns, width});
    for (int group = 0; group < Tile::kGroups; ++group) {
      for (int lane = 0; lane < Tile::kVector; ++lane) {
        const int column = Tile::column(thread, group) + lane;
        if (column >= width) continue;
        const int row = Tile::row(thread, group);
        const double expected = exact(operands.rows, operands.weights, row, column);
        worst = std::max(worst, std::abs(expected - static_cast<double>(sums[group][lane])));
      }
    }
  }
  return worst;
}

template <class Format>
void print_largest_error() {
  const double worst =
      std::max({largest_error<TileOf<Format, 64>>(64), largest_error<TileOf<Format, 64>>(40),
                largest_error<TileOf<Format, 32>>(32), largest_error<TileOf<Format, 32>>(24)});
  std::printf("%s %.3e\n", Format::name, worst);
}

/// A sum of thread 0, one factor of which is beyond the range of fp16.
float sum_beyond_range() {
  using Tile = TileOf<Fp16, 64>;
  const Operands<Fp16> operands;
  *operands.rows.at(0, 5) = 1e5f;
  Tile::Vector sums[Tile::kGroups] = {};
  Tile::multiply(0, sums, operands.rows, kInputs, {operands.laid_out.data(), kWeightColumns, 64});
  return sums[0][0];
}

}  // namespace

int main() {
  print_largest_error<Float32>();
  print_largest_error<Tf32x3>();
  print_largest_error<Tf32>();
  print_largest_error<Bf16x3>();
  print_largest_error<Fp16>();
  std::printf("beyond %.3e\n", std::abs(sum_beyond_range()));
}
