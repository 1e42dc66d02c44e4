#include "backends/cpu/readout.h"

#include <algorithm>
#include <atomic>
#include <optional>
#include <utility>

#include "moecalc/error.h"
#include "ops/layer.h"

namespace moecalc {
namespace {

constexpr int64_t kRows = 32;  // atoms that one task works on

/// Rows of a (rows, columns) matrix, `stride` apart in `n_rows` padded rows.
template <class T>
std::vector<T> padded_rows(const double* values, int64_t rows, int64_t columns, int64_t n_rows,
                           int64_t stride) {
  std::vector<T> out(static_cast<size_t>(n_rows * stride), T(0));
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; ++c) {
      out[static_cast<size_t>(r * stride + c)] = static_cast<T>(values[r * columns + c]);
    }
  }
  return out;
}

template <class T>
std::vector<T> padded_row(const Array& values, int64_t stride) {
  return padded_rows<T>(values.data<double>(), 1, values.numel(), 1, stride);
}

/// (rows, columns) -> (columns, rows)
template <class T>
std::vector<T> transposed(const std::vector<T>& from, int64_t rows, int64_t columns) {
  std::vector<T> out(from.size());
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; ++c) {
      out[static_cast<size_t>(c * rows + r)] = from[static_cast<size_t>(r * columns + c)];
    }
  }
  return out;
}

/// `T`: what the fitting net computes in.
template <class T>
class FittingNet final : public Readout {
 public:
  FittingNet(const ReadoutSource& source, const std::string& instruction_set, ThreadPool& threads)
      : kernels_(ops::kernels<T>(instruction_set.c_str())),
        threads_(threads),
        out_(padded_row<T>(source.out_matrix, ops::padded<T>(source.out_matrix.numel()))),
        out_bias_(static_cast<T>(source.out_bias)) {
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

  Array evaluate(const Array& v, const std::vector<int64_t>& types, Array* dv) override {
    return v.dtype() == Dtype::float32 ? evaluate_as<float>(v, types, dv) : evaluate_as<double>(v, types, dv);
  }

 private:
  struct Layer {
    int64_t n_in = 0, n_out = 0, in = 0, out = 0;  // widths, unpadded and padded
    int64_t residual = 0;                          // 0, 1 or 2 copies of the input are added
    ops::Activation phi;
    std::vector<T> w, w_t, b, idt;  // in x out, out x in; the padding of idt is zero
  };
  /// Of one thread: inputs of every layer and the last output; slopes of every layer; gradients.
  struct Memory {
    ops::Buffer<T> x, slope, dy, dx;
  };

  void add_layer(const FittingLayerSource& from) {
    const std::optional<ops::Activation> phi = kernel_activation(from.phi);
    if (!phi) throw Unsupported{"activation " + from.phi.kind};
    Layer layer;
    layer.n_in = from.matrix.size(0);
    layer.n_out = from.matrix.size(1);
    layer.in = ops::padded<T>(layer.n_in);
    layer.out = ops::padded<T>(layer.n_out);
    layer.residual = from.residual;
    layer.phi = *phi;
    layer.w = padded_rows<T>(from.matrix.data<double>(), layer.n_in, layer.n_out, layer.in, layer.out);
    layer.w_t = transposed(layer.w, layer.in, layer.out);
    layer.b = padded_row<T>(from.bias, layer.out);
    const std::vector<double> ones(static_cast<size_t>(layer.n_out), 1.0);
    layer.idt = from.idt.defined() ? padded_row<T>(from.idt, layer.out)
                                   : padded_rows<T>(ones.data(), 1, layer.n_out, 1, layer.out);
    widest_ = std::max({widest_, layer.in, layer.out});
    width_ += layer.out;
    layers_.push_back(std::move(layer));
  }

  /// b + constant W, once per type instead of once per atom.
  void fold_constants(int64_t n_rows) {
    first_bias_.clear();
    if (n_constant_ == 0 || layers_.empty()) return;
    const Layer& first = layers_[0];
    first_bias_.assign(static_cast<size_t>(n_rows * first.out), T(0));
    std::vector<double> sums(static_cast<size_t>(first.out));
    for (int64_t row = 0; row < n_rows; ++row) {
      std::fill(sums.begin(), sums.end(), 0.0);
      for (int64_t k = 0; k < n_constant_; ++k) {
        const double x = constant_[static_cast<size_t>(row * n_constant_ + k)];
        const T* w = first.w.data() + (n_feature_ - n_constant_ + k) * first.out;
        for (size_t d = 0; d < sums.size(); ++d) sums[d] += x * static_cast<double>(w[d]);
      }
      for (size_t d = 0; d < sums.size(); ++d) {
        const double sum = sums[d] + static_cast<double>(first.b[d]);
        first_bias_[static_cast<size_t>(row) * sums.size() + d] = static_cast<T>(sum);
      }
    }
  }

  /// What the first layer adds to the products of an atom's features.
  const T* first_bias(int64_t type) const {
    return first_bias_.empty() ? layers_[0].b.data() : first_bias_.data() + type * layers_[0].out;
  }

  template <class V>
  Array evaluate_as(const Array& v, const std::vector<int64_t>& types, Array* dv) {
    const int64_t n = v.size(0), width = v.size(1);
    if (width + n_constant_ != n_feature_) {
      throw Error("expected a fitting net for " + std::to_string(width + n_constant_) +
                  " features, got one for " + std::to_string(n_feature_) + ": package the checkpoint again");
    }
    Array energies = Array::empty({n}, Dtype::float64);
    if (dv != nullptr) *dv = Array::empty({n, width}, v.dtype());
    const V* from = v.data<V>();
    const int64_t* type = types.data();
    auto* energy = energies.data<double>();
    V* to = dv == nullptr ? nullptr : dv->data<V>();
    const int64_t n_task = (n + kRows - 1) / kRows;
    const auto n_thread = static_cast<int>(std::min<int64_t>(threads_.size(), n_task));
    if (memory_.size() < static_cast<size_t>(n_thread)) memory_.resize(static_cast<size_t>(n_thread));
    std::atomic<int64_t> next{0};
    threads_.run(n_thread, [&](int thread) {
      Memory& memory = memory_[static_cast<size_t>(thread)];
      for (int64_t task = next++; task < n_task; task = next++) {
        const int64_t begin = task * kRows, rows = std::min(kRows, n - begin);
        forward(memory, begin, rows, from, width, type, energy, to != nullptr);
        if (to != nullptr) backward(memory, begin, rows, to, width, type);
      }
    });
    return energies;
  }

  int64_t n_in() const { return layers_.empty() ? static_cast<int64_t>(out_.size()) : layers_[0].in; }
  int64_t n_out() const { return static_cast<int64_t>(out_.size()); }

  template <class V>
  void forward(Memory& memory, int64_t begin, int64_t rows, const V* v, int64_t width, const int64_t* type,
               double* energy, bool gradients) {
    const int64_t in = n_in();
    T* x = memory.x.get(kRows * (in + width_));
    T* slope = gradients ? memory.slope.get(kRows * width_) : nullptr;
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t i = begin + r;
      T* row = x + r * in;
      for (int64_t d = 0; d < width; ++d) row[d] = static_cast<T>(v[i * width + d]);
      std::copy_n(constant_.data() + type[i] * n_constant_, n_constant_, row + width);
      std::fill(row + width + n_constant_, row + in, T(0));
    }
    for (size_t l = 0; l < layers_.size(); ++l) {
      const Layer& layer = layers_[l];
      T* y = x + kRows * layer.in;
      for (int64_t r = 0; r < rows; ++r) {
        std::copy_n(l == 0 ? first_bias(type[begin + r]) : layer.b.data(), layer.out, y + r * layer.out);
      }
      const int64_t n_product = l == 0 ? width : layer.n_in;  // constants are in the bias
      kernels_.gemm(rows, layer.out, n_product, x, layer.in, layer.w.data(), layer.out, y, layer.out, true);
      if (gradients) {
        kernels_.activate_with_slope(layer.phi, y, slope, rows * layer.out);
      } else {
        kernels_.activate(layer.phi, y, rows * layer.out);
      }
      for (int64_t r = 0; r < rows; ++r) {
        T* row = y + r * layer.out;
        for (int64_t d = 0; d < layer.out; ++d) row[d] *= layer.idt[static_cast<size_t>(d)];
        for (int64_t copy = 0; copy < layer.residual; ++copy) {
          for (int64_t d = 0; d < layer.n_in; ++d) row[copy * layer.n_in + d] += x[r * layer.in + d];
        }
        for (int64_t d = 0; gradients && d < layer.out; ++d) {
          slope[r * layer.out + d] *= layer.idt[static_cast<size_t>(d)];
        }
      }
      x = y;
      if (gradients) slope += kRows * layer.out;
    }
    for (int64_t r = 0; r < rows; ++r) {
      double sum = out_bias_;
      for (int64_t d = 0; d < n_out(); ++d) {
        sum += static_cast<double>(x[r * n_out() + d]) * static_cast<double>(out_[static_cast<size_t>(d)]);
      }
      const auto t = static_cast<size_t>(type[begin + r]);
      energy[begin + r] = (sum + shift_[t]) * weight_[t];
    }
  }

  template <class V>
  void backward(Memory& memory, int64_t begin, int64_t rows, V* dv, int64_t width, const int64_t* type) {
    T *dy = memory.dy.get(kRows * widest_), *dx = memory.dx.get(kRows * widest_);
    for (int64_t r = 0; r < rows; ++r) {
      const T factor = static_cast<T>(weight_[static_cast<size_t>(type[begin + r])]);
      for (int64_t d = 0; d < n_out(); ++d) dy[r * n_out() + d] = factor * out_[static_cast<size_t>(d)];
    }
    T* slope = memory.slope.get(0) + kRows * width_;
    for (size_t l = layers_.size(); l-- > 0;) {
      const Layer& layer = layers_[l];
      slope -= kRows * layer.out;
      for (int64_t k = 0; k < rows * layer.out; ++k) slope[k] *= dy[k];
      kernels_.gemm(rows, layer.in, layer.n_out, slope, layer.out, layer.w_t.data(), layer.in, dx, layer.in,
                    false);
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t copy = 0; copy < layer.residual; ++copy) {
          for (int64_t d = 0; d < layer.n_in; ++d) {
            dx[r * layer.in + d] += dy[r * layer.out + copy * layer.n_in + d];
          }
        }
      }
      std::swap(dx, dy);
    }
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t d = 0; d < width; ++d) dv[(begin + r) * width + d] = static_cast<V>(dy[r * n_in() + d]);
    }
  }

  const ops::Kernels<T>& kernels_;
  ThreadPool& threads_;
  std::vector<Layer> layers_;
  int64_t n_feature_ = 0, n_constant_ = 0;  // of an atom: in all, and those that its type gives
  int64_t width_ = 0, widest_ = 0;          // padded: sum over the layers, and the largest
  std::vector<T> constant_;                 // (K n_types, n_constant)
  std::vector<T> first_bias_;               // (K n_types, padded); empty: that of the first layer
  std::vector<T> out_;
  double out_bias_ = 0.0;
  std::vector<double> shift_, weight_;  // (K n_types) eV
  std::vector<Memory> memory_;          // per thread
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
