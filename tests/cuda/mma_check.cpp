// Products of the tensor-core tiles, fragment by fragment, beside plain sums: prints the largest difference.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <random>
#include <type_traits>
#include <vector>

#include "kernels/cuda/product.cuh"

using namespace moecalc::cuda;

namespace {

constexpr int kInputs = 40;
constexpr int kWeightColumns = 64;

struct alignas(64) Line {
  char bytes[64];
};

template <class Format>
double exact(const SharedRows<Format>& rows, const std::vector<float>& weights, int row, int column) {
  double sum = 0;
  for (int input = 0; input < kInputs; ++input) {
    const float factor = *rows.at(row, input);
    const float weight = weights[static_cast<size_t>(input * kWeightColumns + column)];
    if constexpr (std::is_same_v<Format, Tf32>) {
      sum += double(to_tf32(factor)) * double(to_tf32(weight));
    } else {
      sum += double(factor) * double(weight);
    }
  }
  return sum;
}

/// Largest error of a tile of which `width` columns count; what is in the others is not read.
template <class Format, int COLUMNS>
double largest_error(int width) {
  using Tile = MmaTile<Format, COLUMNS>;
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  std::vector<float> weights(kInputs * kWeightColumns);
  for (float& weight : weights) weight = normal(random);
  const std::vector<float> laid_out = fragments<Format>(weights.data(), kInputs, kWeightColumns);

  const int64_t bytes = SharedRows<Format>::bytes(kInputs);
  std::vector<Line> memory(static_cast<size_t>(bytes + HostBlock::kRedZones) / sizeof(Line) + 1);
  HostBlock block(0, kThreads, memory.data()->bytes, bytes, false);
  const SharedRows<Format> rows(block, kInputs);
  for (int row = 0; row < Format::kRows; ++row) {
    for (int input = 0; input < kInputs; ++input) *rows.at(row, input) = normal(random);
  }

  double worst = 0;
  for (int thread = 0; thread < kThreads; ++thread) {
    typename Tile::Vector sums[Tile::kGroups] = {};
    Tile::multiply(thread, sums, rows, kInputs, {laid_out.data(), kWeightColumns, width});
    for (int group = 0; group < Tile::kGroups; ++group) {
      for (int lane = 0; lane < Tile::kVector; ++lane) {
        const int column = Tile::column(thread, group) + lane;
        if (column >= width) continue;
        const double expected = exact(rows, weights, Tile::row(thread, group), column);
        worst = std::max(worst, std::abs(expected - double(sums[group][lane])));
      }
    }
  }
  return worst;
}

template <class Format>
double largest_error() {
  return std::max({largest_error<Format, 64>(64), largest_error<Format, 64>(40),
                   largest_error<Format, 32>(32), largest_error<Format, 32>(24)});
}

}  // namespace

int main() { std::printf("%.3e %.3e\n", largest_error<Tf32>(), largest_error<Bf16x3>()); }
