#include "readout.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <utility>

#include "moecalc/archive.h"
#include "packed_weights.h"

namespace moecalc {

using torch::jit::Module;

at::ScalarType readout_dtype(const Module& readout) {
  return readout.attr("net").toModule().attr("out_bias").toTensor().scalar_type();
}

ReadoutSource read_readout(const Module& readout, int64_t n_types, at::ScalarType dtype) {
  ReadoutSource source;
  const auto doubles = [](const at::Tensor& values) {
    return values.detach().to(at::kCPU, at::kDouble).contiguous();
  };
  source.shift = doubles(readout.attr("energy_shift").toTensor());
  source.weight = doubles(readout.attr("energy_weight").toTensor());
  const Module net = readout.attr("net").toModule();
  if (readout_dtype(readout) != dtype) {
    throw Unsupported{"a fitting net of another precision than the layers"};
  }
  source.out_matrix = doubles(net.attr("out_matrix").toTensor()).reshape({-1});
  source.out_bias = net.attr("out_bias").toTensor().item().toDouble();
  source.constant = at::zeros({n_types, 0}, at::TensorOptions().dtype(at::kDouble));
  if (net.attr("concat_table").toBool()) {
    Module table = net.attr("table").toModule();
    const at::Tensor rows = doubles(table.get_method("forward")({}).toTensor());
    source.constant = at::cat({source.constant, rows}, 1);
  }
  if (net.attr("with_case").toBool()) {
    const at::Tensor row = doubles(net.attr("case_embedding").toTensor()).unsqueeze(0);
    source.constant = at::cat({source.constant, row.expand({n_types, row.size(1)})}, 1).contiguous();
  }
  if (net.hasattr("n_constant")) {  // of conditions, which are not known yet
    const at::Tensor none = at::zeros({n_types, net.attr("n_constant").toInt()}, source.constant.options());
    source.constant = at::cat({source.constant, none}, 1).contiguous();
  }
  for (const auto& child : net.attr("layers").toModule().named_children()) {
    const Module& module = child.value;
    ReadoutSource::Layer layer;
    layer.matrix = doubles(module.attr("matrix").toTensor());
    layer.bias = doubles(module.attr("bias").toTensor());
    layer.idt =
        module.attr("has_idt").toBool() ? doubles(module.attr("idt").toTensor()) : at::ones_like(layer.bias);
    layer.residual = module.attr("residual").toInt();
    layer.phi = activation_of(module.attr("phi").toModule());
    source.layers.push_back(layer);
  }
  return source;
}

void ReadoutSource::set_types(const TypeTables& tables) {
  constant = tables.fitting;
  const int64_t n_types = constant.size(0) / tables.n_conditions;
  shift = shift.narrow(0, 0, n_types).repeat({tables.n_conditions}).contiguous();
  weight = weight.narrow(0, 0, n_types).repeat({tables.n_conditions}).contiguous();
}

namespace {

constexpr int64_t kRows = 32;  // atoms that one task works on

template <class T>
std::vector<T> values_of(const at::Tensor& values) {
  const at::Tensor doubles = values.to(at::kDouble).contiguous();
  const auto* from = doubles.const_data_ptr<double>();
  return std::vector<T>(from, from + doubles.numel());
}

/// Rows of `from` (rows, columns), padded to `stride` columns and `n_rows` rows.
template <class T>
std::vector<T> padded_rows(const at::Tensor& from, int64_t n_rows, int64_t stride) {
  const std::vector<T> values = values_of<T>(from);
  const int64_t columns = from.size(-1), rows = columns == 0 ? 0 : from.numel() / columns;
  std::vector<T> out(static_cast<size_t>(n_rows * stride), T(0));
  for (int64_t r = 0; r < rows; ++r) {
    std::copy_n(values.data() + r * columns, columns, out.data() + r * stride);
  }
  return out;
}

/// `T`: what the fitting net computes in.
template <class T>
class FittingNet final : public Readout {
 public:
  FittingNet(ReadoutSource source, ThreadPool& threads)
      : source_(std::move(source)),
        kernels_(ops::kernels<T>(std::getenv("MOECALC_CPU"))),
        threads_(threads),
        n_feature_(source_.layers.empty() ? source_.out_matrix.numel() : source_.layers[0].matrix.size(0)),
        n_constant_(source_.constant.size(1)),
        out_(padded_rows<T>(source_.out_matrix, 1, ops::padded<T>(source_.out_matrix.numel()))),
        out_bias_(source_.out_bias) {
    for (const ReadoutSource::Layer& from : source_.layers) {
      Layer layer;
      layer.n_in = from.matrix.size(0), layer.n_out = from.matrix.size(1);
      layer.in = ops::padded<T>(layer.n_in), layer.out = ops::padded<T>(layer.n_out);
      layer.residual = from.residual;
      layer.phi = from.phi;
      layer.w = padded_rows<T>(from.matrix, layer.in, layer.out);
      layer.w_t = padded_rows<T>(from.matrix.t(), layer.out, layer.in);
      layer.b = padded_rows<T>(from.bias, 1, layer.out);
      layer.idt = padded_rows<T>(from.idt, 1, layer.out);
      layers_.push_back(std::move(layer));
    }
    widest_ = static_cast<int64_t>(out_.size());
    for (const Layer& layer : layers_) {
      widest_ = std::max({widest_, layer.in, layer.out});
      width_ += layer.out;
    }
    read_types();
  }

  void set_types(const TypeTables& tables) override {
    source_.set_types(tables);
    read_types();
  }

  at::Tensor evaluate(const at::Tensor& v, const at::Tensor& types, at::Tensor* dv) override {
    return v.scalar_type() == at::kFloat ? evaluate_as<float>(v, types, dv)
                                         : evaluate_as<double>(v, types, dv);
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

  void read_types() {
    constant_ = values_of<T>(source_.constant);
    shift_ = values_of<double>(source_.shift);
    weight_ = values_of<double>(source_.weight);
    first_bias_.clear();
    if (n_constant_ == 0 || layers_.empty()) return;
    // b + constant W, once per type instead of once per atom
    const ReadoutSource::Layer& first = source_.layers[0];
    const at::Tensor rows =
        source_.constant.matmul(first.matrix.narrow(0, n_feature_ - n_constant_, n_constant_)) + first.bias;
    first_bias_ = padded_rows<T>(rows, rows.size(0), layers_[0].out);
  }

  /// What the first layer adds to the products of an atom's features.
  const T* first_bias(int64_t type) const {
    return first_bias_.empty() ? layers_[0].b.data() : first_bias_.data() + type * layers_[0].out;
  }

  template <class V>
  at::Tensor evaluate_as(const at::Tensor& v_in, const at::Tensor& types_in, at::Tensor* dv_out) {
    const at::Tensor v = v_in.contiguous(), types = types_in.contiguous();
    const int64_t n = v.size(0), width = v.size(1);
    if (width + n_constant_ != n_feature_) {
      throw Error("expected a fitting net for " + std::to_string(width + n_constant_) +
                  " features, got one for " + std::to_string(n_feature_) + ": package the checkpoint again");
    }
    at::Tensor energies = at::empty({n}, at::TensorOptions().dtype(at::kDouble));
    if (dv_out != nullptr) *dv_out = at::empty({n, width}, v.options());
    const V* from = v.template const_data_ptr<V>();
    const auto* type = types.template const_data_ptr<int64_t>();
    auto* energy = energies.template mutable_data_ptr<double>();
    V* to = dv_out == nullptr ? nullptr : dv_out->template mutable_data_ptr<V>();
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

  ReadoutSource source_;
  const ops::Kernels<T>& kernels_;
  ThreadPool& threads_;
  std::vector<Layer> layers_;
  int64_t n_feature_ = 0, n_constant_ = 0;  // of an atom: in all, and those that its element gives
  int64_t width_ = 0, widest_ = 0;          // padded: sum over the layers, and the largest
  std::vector<T> constant_, first_bias_, out_;
  double out_bias_ = 0.0;
  std::vector<double> shift_, weight_;
  std::vector<Memory> memory_;  // per thread
};

}  // namespace

std::unique_ptr<Readout> make_readout(const Module& readout, int64_t n_types, ThreadPool& threads,
                                      std::string& reason) {
  try {
    const at::ScalarType dtype = readout_dtype(readout);
    const ReadoutSource source = read_readout(readout, n_types, dtype);
    if (dtype == at::kFloat) return std::make_unique<FittingNet<float>>(source, threads);
    if (dtype == at::kDouble) return std::make_unique<FittingNet<double>>(source, threads);
    reason = "a fitting net that is neither float32 nor float64";
  } catch (const Unsupported& option) {
    reason = option.reason;
  }
  return nullptr;
}

}  // namespace moecalc
