#include "backends/cpu/readout.h"

#include <algorithm>
#include <atomic>
#include <optional>
#include <utility>

#include "core/transpose.h"
#include "kernels/common/layer.h"
#include "moecalc/error.h"

namespace moecalc {
namespace {

constexpr int64_t kRows = 32;  // atoms that one task works on

/// Rows of a (rows, columns) matrix, `stride` apart in `n_rows` padded rows.
template <class Real>
std::vector<Real> padded_rows(const double* values, int64_t rows, int64_t columns, int64_t n_rows,
                              int64_t stride) {
  std::vector<Real> out(static_cast<size_t>(n_rows * stride), Real(0));
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; ++c) {
      out[static_cast<size_t>(r * stride + c)] = static_cast<Real>(values[r * columns + c]);
    }
  }
  return out;
}

template <class Real>
std::vector<Real> padded_row(const Array& values, int64_t stride) {
  return padded_rows<Real>(values.data<double>(), 1, values.numel(), 1, stride);
}

/// `Real`: what the fitting net computes in.
template <class Real>
class FittingNet final : public Readout {
 public:
  FittingNet(const ReadoutSource& source, const std::string& instruction_set, ThreadPool& threads)
      : kernels_(kernels::select_kernels<Real>(instruction_set.c_str())),
        threads_(threads),
        out_(padded_row<Real>(source.out_matrix, kernels::padded<Real>(source.out_matrix.numel()))),
        out_bias_(static_cast<Real>(source.out_bias)) {
    n_feature_ = source.out_matrix.numel();
    if (!source.layers.empty()) n_feature_ = source.layers[0].matrix.size(0);
    widest_ = static_cast<int64_t>(out_.size());
    for (const FittingLayerSource& layer : source.layers) add_layer(layer);
  }

  void set_tables(const TypeTables& tables) override {
    shift_ = tables.energy_shift;
    weight_ = tables.energy_weight;
    n_constant_ = tables.fitting.size(1);
    const auto* constant = tables.fitting.data<double>();
    constant_.assign(constant, constant + tables.fitting.numel());
    fold_constants(tables.fitting.size(0));
  }

  Array evaluate(const Array& features, const std::vector<int64_t>& types, Array* d_features) override {
    return features.dtype() == Dtype::float32 ? evaluate_as<float>(features, types, d_features)
                                              : evaluate_as<double>(features, types, d_features);
  }

 private:
  struct Layer {
    int64_t n_in = 0;
    int64_t n_out = 0;
    int64_t in_stride = 0;  // padded
    int64_t out_stride = 0;
    int64_t residual = 0;  // 0, 1 or 2 copies of the input are added
    kernels::Activation activation;
    std::vector<Real> matrix;      // in_stride x out_stride
    std::vector<Real> transposed;  // out_stride x in_stride
    std::vector<Real> bias;
    std::vector<Real> step;  // idt; its padding is zero
  };
  /// Of one thread.
  struct Memory {
    kernels::Buffer<Real> values;  // inputs of every layer and the last output
    kernels::Buffer<Real> slope;   // of every layer
    kernels::Buffer<Real> d_output;
    kernels::Buffer<Real> d_input;
  };
  /// Atoms begin..begin + n_row, and their features of `width` numbers.
  struct Rows {
    int64_t begin;
    int64_t n_row;
    int64_t width;
    const int64_t* type;
  };

  void add_layer(const FittingLayerSource& from) {
    const std::optional<kernels::Activation> activation = kernel_activation(from.phi);
    if (!activation) throw Unsupported{"activation " + from.phi.kind};
    Layer layer;
    layer.n_in = from.matrix.size(0);
    layer.n_out = from.matrix.size(1);
    layer.in_stride = kernels::padded<Real>(layer.n_in);
    layer.out_stride = kernels::padded<Real>(layer.n_out);
    layer.residual = from.residual;
    layer.activation = *activation;
    layer.matrix = padded_rows<Real>(from.matrix.data<double>(), layer.n_in, layer.n_out, layer.in_stride,
                                     layer.out_stride);
    layer.transposed.resize(layer.matrix.size());
    transpose(layer.matrix.data(), layer.in_stride, layer.out_stride, layer.transposed.data());
    layer.bias = padded_row<Real>(from.bias, layer.out_stride);
    const std::vector<double> ones(static_cast<size_t>(layer.n_out), 1.0);
    layer.step = from.idt.defined() ? padded_row<Real>(from.idt, layer.out_stride)
                                    : padded_rows<Real>(ones.data(), 1, layer.n_out, 1, layer.out_stride);
    widest_ = std::max({widest_, layer.in_stride, layer.out_stride});
    width_ += layer.out_stride;
    layers_.push_back(std::move(layer));
  }

  /// b + constant W, once per type instead of once per atom.
  void fold_constants(int64_t n_row) {
    first_bias_.clear();
    if (n_constant_ == 0 || layers_.empty()) return;
    const Layer& first = layers_[0];
    first_bias_.assign(static_cast<size_t>(n_row * first.out_stride), Real(0));
    std::vector<double> sums(static_cast<size_t>(first.out_stride));
    for (int64_t row = 0; row < n_row; ++row) {
      std::fill(sums.begin(), sums.end(), 0.0);
      for (int64_t k = 0; k < n_constant_; ++k) {
        const double constant = constant_[static_cast<size_t>(row * n_constant_ + k)];
        const Real* weights = first.matrix.data() + (n_feature_ - n_constant_ + k) * first.out_stride;
        for (size_t d = 0; d < sums.size(); ++d) sums[d] += constant * static_cast<double>(weights[d]);
      }
      for (size_t d = 0; d < sums.size(); ++d) {
        const double sum = sums[d] + static_cast<double>(first.bias[d]);
        first_bias_[static_cast<size_t>(row) * sums.size() + d] = static_cast<Real>(sum);
      }
    }
  }

  /// What the first layer adds to the products of an atom's features.
  const Real* first_bias(int64_t type) const {
    return first_bias_.empty() ? layers_[0].bias.data() : first_bias_.data() + type * layers_[0].out_stride;
  }

  /// `Feature`: float or double, that of the layers.
  template <class Feature>
  Array evaluate_as(const Array& features, const std::vector<int64_t>& types, Array* d_features) {
    const int64_t n_atom = features.size(0);
    const int64_t width = features.size(1);
    if (width + n_constant_ != n_feature_) {
      throw Error("expected a fitting net for " + std::to_string(width + n_constant_) +
                  " features, got one for " + std::to_string(n_feature_) + ": package the checkpoint again");
    }
    Array energies = Array::empty({n_atom}, Dtype::float64);
    if (d_features != nullptr) *d_features = Array::empty({n_atom, width}, features.dtype());
    const Feature* from = features.data<Feature>();
    auto* energy = energies.data<double>();
    Feature* to = d_features == nullptr ? nullptr : d_features->data<Feature>();
    const int64_t n_task = (n_atom + kRows - 1) / kRows;
    const auto n_thread = static_cast<int>(std::min<int64_t>(threads_.size(), n_task));
    if (memory_.size() < static_cast<size_t>(n_thread)) memory_.resize(static_cast<size_t>(n_thread));
    std::atomic<int64_t> next{0};
    threads_.run(n_thread, [&](int thread) {
      Memory& memory = memory_[static_cast<size_t>(thread)];
      for (int64_t task = next++; task < n_task; task = next++) {
        const int64_t begin = task * kRows;
        const Rows rows{begin, std::min(kRows, n_atom - begin), width, types.data()};
        forward(memory, rows, from, energy, to != nullptr);
        if (to != nullptr) backward(memory, rows, to);
      }
    });
    return energies;
  }

  int64_t in_stride() const {
    return layers_.empty() ? static_cast<int64_t>(out_.size()) : layers_[0].in_stride;
  }
  int64_t last_stride() const { return static_cast<int64_t>(out_.size()); }

  /// E_i = net_i w + shift; a layer of the net: y = phi(x W + b) * step, plus copies of x.
  template <class Feature>
  void forward(Memory& memory, const Rows& rows, const Feature* features, double* energy, bool gradients) {
    const int64_t stride = in_stride();
    Real* input = memory.values.get(kRows * (stride + width_));
    Real* slope = gradients ? memory.slope.get(kRows * width_) : nullptr;
    for (int64_t r = 0; r < rows.n_row; ++r) {
      const int64_t atom = rows.begin + r;
      Real* row = input + r * stride;
      for (int64_t d = 0; d < rows.width; ++d) row[d] = static_cast<Real>(features[atom * rows.width + d]);
      std::copy_n(constant_of(rows.type[atom]), n_constant_, row + rows.width);
      std::fill(row + rows.width + n_constant_, row + stride, Real(0));
    }
    for (size_t index = 0; index < layers_.size(); ++index) {
      Real* output = input + kRows * layers_[index].in_stride;
      layer_forward(index, rows, input, output, slope);
      input = output;
      if (gradients) slope += kRows * layers_[index].out_stride;
    }
    for (int64_t r = 0; r < rows.n_row; ++r) {
      double sum = out_bias_;
      for (int64_t d = 0; d < last_stride(); ++d) {
        const auto weight = static_cast<double>(out_[static_cast<size_t>(d)]);
        sum += static_cast<double>(input[r * last_stride() + d]) * weight;
      }
      const auto type = static_cast<size_t>(rows.type[rows.begin + r]);
      energy[rows.begin + r] = (sum + shift_[type]) * weight_[type];
    }
  }

  const Real* constant_of(int64_t type) const { return constant_.data() + type * n_constant_; }

  /// `slope`: of the output without the copies, or null.
  void layer_forward(size_t index, const Rows& rows, const Real* input, Real* output, Real* slope) {
    const Layer& layer = layers_[index];
    const int64_t stride = layer.out_stride;
    for (int64_t r = 0; r < rows.n_row; ++r) {
      const Real* bias = index == 0 ? first_bias(rows.type[rows.begin + r]) : layer.bias.data();
      std::copy_n(bias, stride, output + r * stride);
    }
    const int64_t n_product = index == 0 ? rows.width : layer.n_in;  // constants are in the bias
    kernels_.product(rows.n_row, stride, n_product, input, layer.in_stride, layer.matrix.data(), stride,
                     output, stride, true);
    if (slope != nullptr) {
      kernels_.activate_with_slope(layer.activation, output, slope, rows.n_row * stride);
    } else {
      kernels_.activate(layer.activation, output, rows.n_row * stride);
    }
    for (int64_t r = 0; r < rows.n_row; ++r) {
      Real* row = output + r * stride;
      for (int64_t d = 0; d < stride; ++d) row[d] *= layer.step[static_cast<size_t>(d)];
      for (int64_t copy = 0; copy < layer.residual; ++copy) {
        for (int64_t d = 0; d < layer.n_in; ++d) {
          row[copy * layer.n_in + d] += input[r * layer.in_stride + d];
        }
      }
      for (int64_t d = 0; slope != nullptr && d < stride; ++d) {
        slope[r * stride + d] *= layer.step[static_cast<size_t>(d)];
      }
    }
  }

  template <class Feature>
  void backward(Memory& memory, const Rows& rows, Feature* d_features) {
    Real* d_output = memory.d_output.get(kRows * widest_);
    Real* d_input = memory.d_input.get(kRows * widest_);
    for (int64_t r = 0; r < rows.n_row; ++r) {
      const auto factor = static_cast<Real>(weight_[static_cast<size_t>(rows.type[rows.begin + r])]);
      for (int64_t d = 0; d < last_stride(); ++d) {
        d_output[r * last_stride() + d] = factor * out_[static_cast<size_t>(d)];
      }
    }
    Real* slope = memory.slope.get(0) + kRows * width_;
    for (size_t index = layers_.size(); index-- > 0;) {
      const Layer& layer = layers_[index];
      slope -= kRows * layer.out_stride;
      for (int64_t k = 0; k < rows.n_row * layer.out_stride; ++k) slope[k] *= d_output[k];
      kernels_.product(rows.n_row, layer.in_stride, layer.n_out, slope, layer.out_stride,
                       layer.transposed.data(), layer.in_stride, d_input, layer.in_stride, false);
      for (int64_t r = 0; r < rows.n_row; ++r) {
        for (int64_t copy = 0; copy < layer.residual; ++copy) {
          for (int64_t d = 0; d < layer.n_in; ++d) {
            d_input[r * layer.in_stride + d] += d_output[r * layer.out_stride + copy * layer.n_in + d];
          }
        }
      }
      std::swap(d_input, d_output);
    }
    for (int64_t r = 0; r < rows.n_row; ++r) {
      Feature* row = d_features + (rows.begin + r) * rows.width;
      for (int64_t d = 0; d < rows.width; ++d) row[d] = static_cast<Feature>(d_output[r * in_stride() + d]);
    }
  }

  const kernels::Kernels<Real>& kernels_;
  ThreadPool& threads_;
  std::vector<Layer> layers_;
  int64_t n_feature_ = 0;         // of an atom: in all
  int64_t n_constant_ = 0;        // those that its type gives
  int64_t width_ = 0;             // padded: sum over the layers
  int64_t widest_ = 0;            // padded: the largest
  std::vector<Real> constant_;    // (K n_types, n_constant)
  std::vector<Real> first_bias_;  // (K n_types, padded); empty: that of the first layer
  std::vector<Real> out_;         // matrix of the last map, which has one output
  double out_bias_ = 0.0;
  std::vector<double> shift_;   // (K n_types) eV
  std::vector<double> weight_;  // (K n_types)
  std::vector<Memory> memory_;  // per thread
};

}  // namespace

std::unique_ptr<Readout> make_readout(const ReadoutSource& source, const std::string& instruction_set,
                                      ThreadPool& threads) {
  switch (source.dtype) {
    case Dtype::float32:
      return std::make_unique<FittingNet<float>>(source, instruction_set, threads);
    case Dtype::float64:
      return std::make_unique<FittingNet<double>>(source, instruction_set, threads);
    default:
      throw Unsupported{"a fitting net that is neither float32 nor float64"};
  }
}

}  // namespace moecalc
