#include "moecalc/evaluator.h"

#include <ATen/ATen.h>
#include <ATen/DeviceGuard.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/grad_mode.h>
#include <torch/csrc/jit/api/module.h>
#include <torch/csrc/jit/runtime/graph_executor.h>
#include <torch/cuda.h>
#include <torch/version.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <exception>
#include <optional>
#include <set>
#include <utility>

#include "conditions.h"
#include "device.h"
#include "fused.h"
#include "graph.h"
#include "moecalc/clean_state.h"
#include "moecalc/text.h"
#include "package_check.h"
#include "package_reader.h"
#include "readout.h"
#include "reference_check.h"
#include "threads.h"

namespace moecalc {

GhostExchange::~GhostExchange() = default;

namespace {

using torch::jit::IValue;
using torch::jit::Module;

constexpr int64_t most_checked_weights = int64_t{256} << 20;  // bytes laid out for reference frames

// --- errors --------------------------------------------------------------------------------------

/// The line of a torch message that says what happened.
std::string essence(const std::exception& exception) {
  const auto* torch_error = dynamic_cast<const c10::Error*>(&exception);
  std::string text = torch_error != nullptr ? torch_error->what_without_backtrace() : exception.what();
  // The TorchScript interpreter puts a traceback first and the cause behind its last "...Error: ".
  if (text.find("TorchScript") != std::string::npos) {
    const size_t cause = text.rfind("Error: ");
    if (cause != std::string::npos) text = text.substr(cause + 7);
  }
  const size_t start = text.find_first_not_of(" \n\t");
  text = start == std::string::npos ? std::string("unknown error") : text.substr(start);
  return printable(text.substr(0, text.find('\n')), 400);
}

/// TorchScript turns exceptions into runtime_error, so the type alone does not tell.
bool is_out_of_memory(const std::exception& exception) {
  if (dynamic_cast<const c10::OutOfMemoryError*>(&exception) != nullptr ||
      dynamic_cast<const std::bad_alloc*>(&exception) != nullptr) {
    return true;
  }
  const std::string text = exception.what();
  return text.find("out of memory") != std::string::npos ||
         text.find("can't allocate memory") != std::string::npos;
}

[[noreturn]] void rethrow(const std::exception& exception, const std::string& context) {
  if (const auto* ours = dynamic_cast<const OutOfMemoryError*>(&exception)) throw *ours;
  if (const auto* ours = dynamic_cast<const Error*>(&exception)) throw *ours;
  if (is_out_of_memory(exception)) {
    throw OutOfMemoryError("out of memory " + context +
                           ": use fewer atoms per process, dtype float32 or a device with more memory (" +
                           essence(exception) + ")");
  }
  throw Error(context + ": " + essence(exception));
}

/// Zeros must not stand for what was not differentiated.
void check_differentiated(bool differentiated) {
  if (!differentiated) {
    throw Error(
        "expected an energy that depends on the positions, got one without gradients, so there are no "
        "forces: "
        "package the checkpoint again");
  }
}

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// --- devices and types ---------------------------------------------------------------------------

at::Device parse_device(const std::string& name) {
  const bool wants_cuda = name == "cuda" || name.rfind("cuda:", 0) == 0;
  if (name == "cpu" || (name == "auto" && !torch::cuda::is_available())) return {at::kCPU};
  if (!wants_cuda && name != "auto") {
    throw Error("expected `device` to be 'cpu', 'cuda', 'cuda:N' or 'auto', got '" + name + "'");
  }
  if (!torch::cuda::is_available()) {
    throw Error("device '" + name +
                "': torch " TORCH_VERSION
                " finds no CUDA device: use device 'cpu' or install a CUDA build of torch and its driver");
  }
  int64_t index = 0;
  if (name.size() > 5) {
    size_t used = 0;
    try {
      index = std::stoi(name.substr(5), &used);
    } catch (const std::exception&) {
      used = 0;
    }
    if (used == 0 || used != name.size() - 5 || index < 0 || index >= torch::cuda::device_count()) {
      throw Error("expected `device` 'cuda:N' with N in [0, " +
                  std::to_string(static_cast<int>(torch::cuda::device_count())) + "), got '" + name + "'");
    }
  }
  return {at::kCUDA, static_cast<at::DeviceIndex>(index)};
}

at::ScalarType parse_dtype(const std::string& name) {
  if (name == "float64") return at::kDouble;
  if (name == "float32") return at::kFloat;
  throw Error("expected `dtype` to be 'float64', 'float32' or '' (the package's own), got '" + name + "'");
}

ProductPrecision parse_precision(const std::string& name) {
  if (name == "fp32") return ProductPrecision::fp32;
  if (name == "tf32") return ProductPrecision::tf32;
  if (name == "bf16x3") return ProductPrecision::bf16x3;
  throw Error("expected `precision` to be 'fp32', 'tf32' or 'bf16x3', got '" + name + "'");
}

// --- TorchScript ---------------------------------------------------------------------------------

/// f(tensor) for all parameters and buffers.
template <class F>
void for_tensors(const Module& module, const F& f) {
  for (at::Tensor tensor : module.parameters()) f(tensor);
  for (at::Tensor tensor : module.buffers()) f(tensor);
}

/// Sets the dtype of all floating-point parameters and buffers (Module::to converts integer buffers too), but
/// for those that are still in the file.
void convert(const Module& module, at::ScalarType dtype, const DeferredTensors& deferred) {
  for_tensors(module, [&](at::Tensor& tensor) {
    if (tensor.is_floating_point() && !deferred.holds(tensor)) tensor.set_data(tensor.to(dtype));
  });
}

/// Matrices of experts: what a package is made of.
template <class F>
void for_expert_matrices(const std::vector<Module>& layers, const F& f) {
  for (const Module& layer : layers) {
    for (const auto& child : layer.named_children()) {
      if (child.value.hasattr("matrix") && child.value.hasattr("router")) {
        f(child.value.attr("matrix").toTensor());
      }
    }
  }
}

/// The same by name, in a module that is not known to be whole.
bool is_expert_matrix(const std::string& name) {
  const std::string ending = ".matrix";
  return name.rfind("layers.", 0) == 0 && name.size() > ending.size() &&
         name.compare(name.size() - ending.size(), ending.size(), ending) == 0;
}

std::vector<at::Tensor> tensors_of(const IValue& value) {
  if (value.isTensor()) return {value.toTensor()};
  std::vector<at::Tensor> tensors;
  for (const IValue& element : value.toTupleRef().elements()) tensors.push_back(element.toTensor());
  return tensors;
}

/// One part of the model with its detached inputs and its outputs. Backward runs segment by segment, so that
/// the gradients of ghosts can be exchanged in between and no autograd graph spans the model.
class Segment {
 public:
  /// `differentiable`: whether each of `leaves` gets a gradient.
  Segment(const Module& module, std::vector<at::Tensor> leaves, const std::vector<bool>& differentiable)
      : module_(module), leaves_(std::move(leaves)) {
    for (size_t i = 0; i < leaves_.size(); ++i) {
      leaves_[i] = leaves_[i].detach();
      leaves_[i].set_requires_grad(differentiable[i]);
    }
  }

  const at::Tensor& leaf(size_t i) const { return leaves_[i]; }

  void forward(std::vector<IValue> arguments, size_t n_outputs) {
    outputs_ = tensors_of(module_.get_method("forward")(std::move(arguments)));
    if (outputs_.size() != n_outputs) {
      throw Error("expected " + std::to_string(n_outputs) + " outputs of a model segment, got " +
                  std::to_string(outputs_.size()) + ": package the checkpoint again");
    }
  }

  at::Tensor output(size_t i) const { return outputs_[i].detach(); }
  bool output_requires_grad(size_t i) const { return outputs_[i].requires_grad(); }

  /// Gradients with respect to the leaves, given those of the outputs; undefined tensors stand for zero.
  /// Frees the segment's autograd graph.
  std::vector<at::Tensor> backward(const std::vector<at::Tensor>& output_gradients) {
    std::vector<at::Tensor> inputs, outputs, gradients;
    for (const at::Tensor& leaf : leaves_) {
      if (leaf.requires_grad()) inputs.push_back(leaf);
    }
    for (size_t i = 0; i < outputs_.size(); ++i) {
      if (output_gradients[i].defined() && outputs_[i].requires_grad()) {
        outputs.push_back(outputs_[i]);
        gradients.push_back(output_gradients[i]);
      }
    }
    std::vector<at::Tensor> all(leaves_.size());
    if (!inputs.empty() && !outputs.empty()) {
      const auto computed = torch::autograd::grad(outputs, inputs, gradients, /*retain_graph=*/false,
                                                  /*create_graph=*/false, /*allow_unused=*/true);
      size_t next = 0;
      for (size_t i = 0; i < leaves_.size(); ++i) {
        if (leaves_[i].requires_grad()) all[i] = computed[next++];
      }
    }
    outputs_.clear();
    leaves_.clear();
    return all;
  }

 private:
  Module module_;
  std::vector<at::Tensor> leaves_, outputs_;
};

void accumulate(at::Tensor& sum, const at::Tensor& gradient) {
  if (!gradient.defined()) return;
  sum = sum.defined() ? sum + gradient.to(at::kDouble) : gradient.to(at::kDouble);
}

/// Energies of atoms may be finite where their sum is not.
void check_sums(const Evaluation& result) {
  const auto* total = result.energy.const_data_ptr<double>();
  for (int64_t k = 0; k < result.energy.size(0); ++k) {
    if (!std::isfinite(total[k])) throw Error("expected finite energies, got a sum that overflows");
  }
}

void check_finite(const Evaluation& result, const Request& request) {
  const auto* energy = result.energies.const_data_ptr<double>();
  for (int64_t i = 0; i < result.energies.size(0); ++i) {
    if (!std::isfinite(energy[i])) {
      throw Error("expected finite energies, got " + std::to_string(energy[i]) + " eV for atom " +
                  std::to_string(i) + ": its neighbourhood is far outside of the training data");
    }
  }
  if (request.forces && !std::isfinite(result.forces.sum().item<double>())) {
    throw Error(
        "expected finite forces, got NaN or infinity: the structure is far outside of the training data");
  }
}

// --- from edge gradients to forces and virials ---------------------------------------------------

at::TensorOptions cpu_double() { return at::TensorOptions().dtype(at::kDouble).device(at::kCPU); }

/// g = dE/d(edge_vec): f_i += g, f_j -= g, virial -= edge_vec (x) g.
void scatter_on_cpu(const PreparedGraph& graph, const int64_t* system, const at::Tensor& gradient,
                    const Request& request, Evaluation& result) {
  const at::Tensor g_cpu = gradient.contiguous();
  const auto* g = g_cpu.const_data_ptr<double>();
  const auto* vec = graph.edge_vec.const_data_ptr<double>();
  const auto* centre = graph.edge_index.const_data_ptr<int64_t>();
  const int64_t* neighbor = centre + graph.n_edge;
  const auto* row = graph.engine_row.const_data_ptr<int64_t>();
  double* forces = request.forces ? result.forces.mutable_data_ptr<double>() : nullptr;
  double* virial = request.virial ? result.virial.mutable_data_ptr<double>() : nullptr;
  double* atom_virial = request.atom_virial ? result.atom_virial.mutable_data_ptr<double>() : nullptr;
  for (int64_t e = 0; e < graph.n_edge; ++e) {
    const int64_t i = row[centre[e]], j = row[neighbor[e]];
    if (forces != nullptr) {
      for (int a = 0; a < 3; ++a) {
        forces[3 * i + a] += g[3 * e + a];
        forces[3 * j + a] -= g[3 * e + a];
      }
    }
    for (int a = 0; a < 3; ++a) {
      for (int b = 0; b < 3; ++b) {
        const double share = vec[3 * e + a] * g[3 * e + b];
        if (virial != nullptr) virial[9 * system[i] + 3 * a + b] -= share;
        if (atom_virial != nullptr) atom_virial[9 * j + 3 * a + b] -= share;
      }
    }
  }
}

/// The same on a device: results leave it only once they are summed.
void scatter_on_device(const PreparedGraph& graph, const at::Tensor& system, const at::Tensor& edge_index,
                       const at::Tensor& edge_vec, const at::Tensor& gradient, const Request& request,
                       Evaluation& result) {
  const at::Device device = gradient.device();
  const at::Tensor row = graph.engine_row.to(device);
  const at::Tensor i = row.index_select(0, edge_index[0]), j = row.index_select(0, edge_index[1]);
  const auto options = cpu_double().device(device);
  if (request.forces) {
    result.forces =
        at::zeros({graph.n_node, 3}, options).index_add_(0, i, gradient).index_add_(0, j, -gradient).cpu();
  }
  if (request.virial || request.atom_virial) {
    const at::Tensor share = edge_vec.unsqueeze(2) * gradient.unsqueeze(1);
    if (request.virial) {
      const at::Tensor system_of_edge = system.to(device).index_select(0, i);
      const int64_t n_systems = result.virial.size(0);
      result.virial = n_systems == 1
                          ? share.sum(0, /*keepdim=*/true).neg().cpu()
                          : at::zeros({n_systems, 3, 3}, options).index_add_(0, system_of_edge, -share).cpu();
    }
    if (request.atom_virial) {
      result.atom_virial = at::zeros({graph.n_node, 3, 3}, options).index_add_(0, j, -share).cpu();
    }
  }
}

}  // namespace

// --- Evaluator -----------------------------------------------------------------------------------

class Evaluator::Impl {
 public:
  Impl(const std::string& path, const std::string& device, const std::string& dtype,
       const std::string& precision, bool deterministic);
  Evaluation evaluate(const AtomicGraph& graph, const Request& request, GhostExchange* exchange);
  AppliedConditions set_conditions(const GivenConditions& given);
  /// What the check of the frames needed is nothing that the structures to come need.
  struct CheckEnds {
    explicit CheckEnds(Impl& impl) : impl(impl) {}
    CheckEnds(const CheckEnds&) = delete;
    CheckEnds& operator=(const CheckEnds&) = delete;
    ~CheckEnds() {
      impl.conditions_->reset();
      impl.release_weights();
    }
    Impl& impl;
  };
  void set_conditions(const at::Tensor& charge_spin, const at::Tensor& fparam);
  void set_list(const NeighborList& list);
  Evaluation evaluate_positions(const at::Tensor& positions, const at::Tensor& cells, const Request& request,
                                GhostExchange* exchange);

  std::vector<std::string> elements;
  GraphRules rules;
  std::string dtype_name, device_name, metadata, precision_name;
  std::shared_ptr<const PackageFile> file;
  void check_reference(const std::vector<std::string>& wanted);
  void check_frames(const std::vector<const ReferenceFrame*>& frames);
  std::vector<Module> layers;
  std::string backend = "torchscript", backend_reason;

 private:
  void load(const std::string& path, const std::string& dtype);
  void run(const PreparedGraph& graph, const at::Tensor& system, const Request& request,
           GhostExchange* exchange, Evaluation& result);
  void run_fused(const PreparedGraph& graph, const at::Tensor& system, const Request& request,
                 GhostExchange* exchange, Evaluation& result);
  at::Tensor read_out(const at::Tensor& v, const at::Tensor& types, at::Tensor* dv);
  void choose_backend(const DeferredTensors& deferred);
  Evaluation run_on_device(const NeighborList& list, const at::Tensor& positions, const at::Tensor& cells,
                           const Request& request, GhostExchange* exchange);
  Evaluation empty_result(int64_t n_node, int64_t n_local, int64_t n_systems, const Request& request) const;
  void check_exchange(int64_t n_ghost, const GhostExchange* exchange) const;
  void upload(const NeighborList& list);

 public:
  std::vector<at::Tensor> run_layer(const AtomicGraph& graph, int64_t layer,
                                    const std::vector<at::Tensor>& inputs,
                                    const std::vector<at::Tensor>& gradients);
  int64_t buffer_bytes() const {
    if (on_device_ != nullptr) return on_device_->bytes();
    return fused_ == nullptr ? 0 : fused_->bytes();
  }
  int64_t estimate_bytes(int64_t n_node, int64_t n_edge, int64_t n_angle) const {
    return on_device_ == nullptr ? 0 : on_device_->estimate_bytes(n_node, n_edge, n_angle);
  }
  bool keeps_lists() const { return on_device_ != nullptr; }
  void set_num_threads(int n) { n_threads_ = n; }
  int num_threads() const { return n_threads_ > 0 ? n_threads_ : default_threads(); }
  void refuse_after_fork() const;
  int64_t n_packed_groups() const {
    if (on_device_ != nullptr) return on_device_->n_packed_groups();
    return fused_ == nullptr ? 0 : fused_->n_packed_groups();
  }
  void release_weights() {
    if (fused_ != nullptr) fused_->release_weights();
    if (on_device_ != nullptr) on_device_->release_weights();
    list_is_up_ = false;
  }

 private:
  void apply_conditions();
  std::vector<IValue> readout_arguments(const at::Tensor& v, const at::Tensor& types) const;
  void run_without_atoms(int64_t n_node, int64_t n_systems, bool gradients, GhostExchange* exchange);
  at::Tensor group_features(const PreparedGraph& graph, GhostExchange* exchange);
  at::Tensor with_ghosts(const PreparedGraph& graph, const at::Tensor& v_local, GhostExchange* exchange);
  at::Tensor without_ghosts(const PreparedGraph& graph, const at::Tensor& gradient, GhostExchange* exchange);

  at::Device device_;
  at::ScalarType dtype_ = at::kDouble;
  ProductPrecision precision_;
  bool deterministic_;
  Module geometry_, embedding_, readout_;
  int n_threads_ = 0;  // 0: default_threads()
  const pid_t process_ = getpid();
  ThreadPool threads_;  // before what uses it
  // Both null: TorchScript.
  std::unique_ptr<FusedModel> fused_;
  std::unique_ptr<DeviceModel> on_device_;
  std::unique_ptr<Readout> fitting_;  // with fused_; null: TorchScript
  std::unique_ptr<Conditions> conditions_;
  TypeTables tables_;
  NeighborList list_;            // the caller's; types undefined: none yet
  int64_t n_rows_ = 0;           // of positions that list_ names
  bool list_is_up_ = false;      // list_ is what on_device_ holds
  at::Tensor element_features_;  // (n_types, n_dim) at element level: the same in every call
  int64_t node_dim_ = 0;
  std::string reference_ = "[]";  // text of reference.json
};

Evaluator::Impl::Impl(const std::string& path, const std::string& device, const std::string& dtype,
                      const std::string& precision, bool deterministic)
    : precision_name(precision),
      device_(parse_device(device)),
      precision_(parse_precision(precision)),
      deterministic_(deterministic) {
  device_name = device_.str();
  if (!dtype.empty()) parse_dtype(dtype);
  try {
    load(path, dtype);
  } catch (const std::exception& exception) {
    rethrow(exception, path + ": cannot be loaded on " + device_name);
  }
}

void Evaluator::Impl::load(const std::string& path, const std::string& dtype) {
  const CleanState clean;
  const TorchThreads one_thread(1);
  const at::NoGradGuard no_grad;
  const torch::jit::GraphOptimizerEnabledGuard no_optimizer(false);
  file = std::make_shared<const PackageFile>(path);
  metadata = file->record("extra/metadata.json");
  if (file->records().count("extra/reference.json") != 0) reference_ = file->record("extra/reference.json");
  auto [model, deferred] = load_module(file);
  // The matrices of the experts stay in the file, all else is needed in any case.
  std::set<const void*> matrices;
  for (const auto& [name, parameter] : model.named_parameters()) {
    if (is_expert_matrix(name) && parameter.is_contiguous()) matrices.insert(parameter.storage().data());
  }
  for_tensors(model, [&](at::Tensor& tensor) {
    if (matrices.count(tensor.storage().data()) == 0) deferred.fill(tensor);
  });
  check_model(model, deferred, metadata, path);
  for (at::Tensor parameter : model.parameters()) parameter.set_requires_grad(false);
  for (const auto& layer : model.attr("layers").toModule().named_children()) layers.push_back(layer.value);
  for (const IValue& element : model.attr("elements").toListRef()) elements.push_back(element.toStringRef());
  rules.n_types = static_cast<int64_t>(elements.size());
  rules.cutoff = model.attr("cutoff").toDouble();
  rules.angle_cutoff = model.attr("angle_cutoff").toDouble();
  const std::string level = model.attr("routing_level").toStringRef();
  rules.group_by_system = level == "configuration";
  const at::Tensor mask = model.attr("pair_mask").toTensor().to(at::kCPU, at::kByte).contiguous();
  rules.pair_mask.assign(mask.const_data_ptr<uint8_t>(), mask.const_data_ptr<uint8_t>() + mask.numel());

  geometry_ = model.attr("geometry").toModule();
  embedding_ = model.attr("embedding").toModule();
  readout_ = model.attr("readout").toModule();

  dtype_ = model.attr("dtype_probe").toTensor().scalar_type();
  if (!dtype.empty()) dtype_ = parse_dtype(dtype);
  const auto place = [&, converted = !dtype.empty()] {
    if (converted) {
      // Not geometry and not the energy shifts: these are float64 whatever the dtype of the network.
      convert(embedding_, dtype_, deferred);
      for (const Module& layer : layers) convert(layer, dtype_, deferred);
      convert(readout_.attr("net").toModule(), dtype_, deferred);
    }
    if (device_.is_cpu()) return;
    for_tensors(model, [&](at::Tensor& tensor) {
      if (!deferred.holds(tensor)) tensor.set_data(tensor.to(device_));
    });
  };
  place();
  dtype_name = dtype_ == at::kDouble ? "float64" : "float32";

  conditions_ = std::make_unique<Conditions>(model);
  rules.group_by_condition = conditions_->routed() && !rules.group_by_system;
  const at::Tensor identity = at::eye(rules.n_types, at::TensorOptions().dtype(dtype_).device(device_));
  element_features_ = embedding_.get_method("group_features")({identity}).toTensor();
  node_dim_ = element_features_.size(1);
  choose_backend(deferred);
  if (fused_ != nullptr || on_device_ != nullptr) {
    for_expert_matrices(layers,
                        [&](at::Tensor matrix) { matrix.set_data(at::empty({0}, matrix.options())); });
    return;
  }
  for_tensors(model, [&](const at::Tensor& tensor) { deferred.fill(tensor); });
  place();
}

/// The kernels of the device where they cover the model. MOECALC_BACKEND asks for others: torchscript is the
/// slower path, for comparisons; cuda-emulation runs the kernels of the GPU on the CPU, for tests.
void Evaluator::Impl::choose_backend(const DeferredTensors& deferred) {
  const char* wanted = std::getenv("MOECALC_BACKEND");
  const std::string choice = wanted == nullptr ? "" : wanted;
  const bool emulate = choice == "cuda-emulation";
  if (!choice.empty() && choice != "fused" && choice != "torchscript" && !emulate) {
    throw Error("expected MOECALC_BACKEND to be 'fused', 'torchscript' or 'cuda-emulation', got '" + choice +
                "'");
  }
  if (emulate && !device_.is_cpu()) {
    throw Error("MOECALC_BACKEND=cuda-emulation runs on the CPU, got device '" + device_name +
                "': use device 'cpu'");
  }
  const bool on_cpu = device_.is_cpu() && !emulate;
  const bool reduced = precision_ != ProductPrecision::fp32;
  if (reduced && dtype_ == at::kDouble) {
    throw Error("precision '" + precision_name +
                "' is for float32 networks, got dtype float64: use dtype float32, or precision fp32");
  }
  if (reduced && on_cpu) {
    throw Error("precision '" + precision_name +
                "' is for GPUs, got device 'cpu': use precision fp32, or device cuda");
  }
  if (choice == "torchscript") {
    backend_reason = "MOECALC_BACKEND=torchscript";
  } else if (on_cpu) {
    fused_ = make_fused_model(geometry_, embedding_, layers, dtype_, threads_, backend_reason, &deferred);
    if (fused_ != nullptr) {
      backend = std::string("fused ") + fused_->instruction_set();
      fitting_ = make_readout(readout_, rules.n_types, threads_, backend_reason);
    }
  } else {
    const DeviceOptions options{device_, emulate, precision_, deterministic_};
    on_device_ = make_device_model(geometry_, embedding_, layers, readout_, rules, dtype_, options,
                                   backend_reason, &deferred);
    if (on_device_ != nullptr) backend = on_device_->name();
  }
  if (fused_ != nullptr || on_device_ != nullptr) return;
  if (!choice.empty() && choice != "torchscript") {
    throw Error("MOECALC_BACKEND=" + choice + ": the " + (on_cpu ? "fused" : "CUDA") +
                " kernels do not cover " + backend_reason);
  }
  if (reduced) {
    throw Error("precision '" + precision_name + "' needs the CUDA kernels, which do not apply (" +
                backend_reason + "): use precision fp32");
  }
}

at::Tensor Evaluator::Impl::group_features(const PreparedGraph& graph, GhostExchange* exchange) {
  if (!rules.group_by_system) return element_features_;
  at::Tensor composition = graph.composition;
  if (exchange != nullptr) exchange->sum(composition);
  // A structure without atoms has no composition; its rows are never used.
  composition = composition / composition.sum(1, /*keepdim=*/true).clamp_min(1.0);
  std::vector<IValue> arguments{composition.to(device_, dtype_)};
  if (conditions_->routed()) {
    const at::Tensor of_system = at::tensor(conditions_->of_system(), at::TensorOptions().dtype(at::kLong));
    const at::Tensor rows = conditions_->shift().index_select(0, of_system);
    arguments.emplace_back(rows.expand({composition.size(0), -1}).to(device_, dtype_));
  }
  return embedding_.get_method("group_features")(arguments).toTensor();
}

void Evaluator::Impl::set_conditions(const at::Tensor& charge_spin, const at::Tensor& fparam) {
  const std::vector<int64_t> before = conditions_->of_system();
  const bool changed = conditions_->set(charge_spin, fparam);
  if (!changed && before == conditions_->of_system()) return;
  rules.condition_of_system = conditions_->of_system();
  rules.n_conditions = conditions_->n();
  list_is_up_ = false;
  try {
    if (changed) tables_ = type_tables(*conditions_, embedding_, readout_);
    apply_conditions();
  } catch (const std::exception& exception) {
    conditions_->reset();  // half of them must not be used
    rethrow(exception, "setting " + std::to_string(conditions_->n()) + " conditions");
  }
}

AppliedConditions Evaluator::Impl::set_conditions(const GivenConditions& given) {
  const ResolvedConditions resolved = resolve_conditions(metadata, given);
  set_conditions(resolved.charge_spin, resolved.fparam);
  return resolved.applied;
}

/// Hands the tables of the conditions to whatever evaluates.
void Evaluator::Impl::apply_conditions() {
  const at::NoGradGuard no_grad;
  if (rules.group_by_condition) {
    const auto identity = at::eye(rules.n_types, at::TensorOptions().dtype(dtype_).device(device_));
    const at::Tensor shift = conditions_->shift().repeat_interleave(rules.n_types, 0).to(device_, dtype_);
    element_features_ =
        embedding_.get_method("group_features")({identity.repeat({conditions_->n(), 1}), shift}).toTensor();
  }
  if (fused_ != nullptr) fused_->set_types(tables_);
  if (fitting_ != nullptr) fitting_->set_types(tables_);
  if (on_device_ != nullptr) {
    on_device_->set_conditions(tables_, rules, element_features_,
                               conditions_->routed() ? conditions_->shift() : at::Tensor());
  }
}

/// Of the scripted readout, for nodes in model order.
std::vector<IValue> Evaluator::Impl::readout_arguments(const at::Tensor& v, const at::Tensor& types) const {
  if (!conditions_->taken()) return {v, types};
  const auto optional = [&](const at::Tensor& rows) {
    return rows.defined() ? IValue(rows.to(device_)) : IValue();
  };
  return {v, types.remainder(rules.n_types), types.div(rules.n_types, "floor"),
          optional(conditions_->fitting_inputs()), optional(conditions_->shift())};
}

/// (n_local, width) in model order -> (n_node, width): ghosts get the features of their owners.
at::Tensor Evaluator::Impl::with_ghosts(const PreparedGraph& graph, const at::Tensor& v_local,
                                        GhostExchange* exchange) {
  if (exchange == nullptr) return v_local;
  at::Tensor buffer = at::zeros({graph.n_node, v_local.size(1)}, cpu_double().dtype(v_local.scalar_type()));
  buffer.narrow(0, 0, graph.n_local).copy_(v_local.cpu().index_select(0, graph.model_row));
  exchange->forward(buffer);
  const int64_t n_ghost = graph.n_node - graph.n_local;
  return n_ghost == 0 ? v_local
                      : at::cat({v_local, buffer.narrow(0, graph.n_local, n_ghost).to(v_local.device())});
}

/// Gradient of (n_node, width) rows -> of the n_local owned ones, with what other ranks' ghosts contribute.
at::Tensor Evaluator::Impl::without_ghosts(const PreparedGraph& graph, const at::Tensor& gradient,
                                           GhostExchange* exchange) {
  if (exchange == nullptr) return gradient;
  at::Tensor buffer = at::zeros({graph.n_node, node_dim_}, cpu_double().dtype(dtype_));
  if (gradient.defined()) {
    const at::Tensor g = gradient.cpu();
    buffer.narrow(0, 0, graph.n_local).copy_(g.narrow(0, 0, graph.n_local).index_select(0, graph.model_row));
    const int64_t n_ghost = graph.n_node - graph.n_local;
    buffer.narrow(0, graph.n_local, n_ghost).copy_(g.narrow(0, graph.n_local, n_ghost));
  }
  exchange->reverse(buffer);
  return buffer.index_select(0, graph.engine_row.narrow(0, 0, graph.n_local)).to(device_);
}

/// A rank that owns no atoms has nothing to compute, but the others wait for it in every exchange.
void Evaluator::Impl::run_without_atoms(int64_t n_node, int64_t n_systems, bool gradients,
                                        GhostExchange* exchange) {
  if (exchange == nullptr) return;
  if (rules.group_by_system) exchange->sum(at::zeros({n_systems, rules.n_types}, cpu_double()));
  const auto options = cpu_double().dtype(dtype_);
  for (size_t layer = 1; layer < layers.size(); ++layer)
    exchange->forward(at::zeros({n_node, node_dim_}, options));
  for (size_t layer = 1; gradients && layer < layers.size(); ++layer) {
    exchange->reverse(at::zeros({n_node, node_dim_}, options));
  }
}

void Evaluator::Impl::check_exchange(int64_t n_ghost, const GhostExchange* exchange) const {
  if (exchange == nullptr && n_ghost > 0 && layers.size() > 1) {
    throw Error("expected a GhostExchange for " + std::to_string(n_ghost) + " ghost atoms and a model of " +
                std::to_string(layers.size()) +
                " layers, got none: map periodic images to owned atoms or pass one");
  }
}

Evaluation Evaluator::Impl::empty_result(int64_t n_node, int64_t n_local, int64_t n_systems,
                                         const Request& request) const {
  Evaluation result;
  result.energy = at::zeros({n_systems}, cpu_double());
  result.energies = at::zeros({n_local}, cpu_double());
  if (request.forces) result.forces = at::zeros({n_node, 3}, cpu_double());
  if (request.virial) result.virial = at::zeros({n_systems, 3, 3}, cpu_double());
  if (request.atom_virial) result.atom_virial = at::zeros({n_node, 3, 3}, cpu_double());
  return result;
}

Evaluation Evaluator::Impl::evaluate(const AtomicGraph& graph, const Request& request,
                                     GhostExchange* exchange) {
  refuse_after_fork();
  const int n_threads = num_threads();
  threads_.resize(n_threads);
  // Torch gets threads of its own only where it does the work: else a few small operators are left for it.
  const TorchThreads torch_threads(fused_ == nullptr && on_device_ == nullptr ? n_threads : 1);
  if (on_device_ != nullptr) {
    const auto [list, positions] = list_of_graph(graph, rules);
    list_is_up_ = false;
    upload(list);
    return run_on_device(list, positions, at::Tensor(), request, exchange);
  }
  const auto start = std::chrono::steady_clock::now();
  const c10::OptionalDeviceGuard device_guard(device_.is_cuda() ? std::optional<at::Device>(device_)
                                                                : std::nullopt);
  conditions_->check(graph.n_systems, graph.types.numel() - graph.system_index.numel());
  const PreparedGraph prepared = prepare_graph(graph, rules, /*with_angle_index=*/fused_ == nullptr);
  check_exchange(prepared.n_node - prepared.n_local, exchange);
  Evaluation result = empty_result(prepared.n_node, prepared.n_local, graph.n_systems, request);
  result.timings.emplace_back("graph", seconds_since(start));
  result.n_edge = prepared.n_edge;
  result.n_angle = prepared.n_angle;
  result.max_neighbors = prepared.max_neighbors;
  result.max_angle_neighbors = prepared.max_angle_neighbors;
  if (prepared.n_local == 0) {
    run_without_atoms(prepared.n_node, graph.n_systems,
                      request.forces || request.virial || request.atom_virial, exchange);
    return result;
  }

  const at::Tensor system = graph.system_index.contiguous();
  try {
    fused_ != nullptr ? run_fused(prepared, system, request, exchange, result)
                      : run(prepared, system, request, exchange, result);
  } catch (const std::exception& exception) {
    rethrow(exception, "evaluating " + std::to_string(prepared.n_local) + " atoms, " +
                           std::to_string(prepared.n_edge) + " edges and " +
                           std::to_string(prepared.n_angle) + " angles on " + device_name);
  }

  check_finite(result, request);
  const auto* atom_energy = result.energies.const_data_ptr<double>();
  const auto* system_of = system.const_data_ptr<int64_t>();
  auto* energy = result.energy.mutable_data_ptr<double>();
  for (int64_t i = 0; i < prepared.n_local; ++i) energy[system_of[i]] += atom_energy[i];
  check_sums(result);
  return result;
}

/// What cannot work in a process that was forked would wait for threads that are gone.
void Evaluator::Impl::refuse_after_fork() const {
  const char* const remedy =
      ": start processes with multiprocessing.get_context('spawn') or 'forkserver', or make the calculator "
      "in "
      "each of them";
  if (device_.is_cuda() && process_ != getpid()) {
    throw Error("device '" + device_name +
                "' cannot be used in a forked process by a calculator that was made before the fork" +
                remedy);
  }
  if (is_forked() && device_.is_cpu() && on_device_ == nullptr && fitting_ == nullptr) {
    throw Error("TorchScript cannot run in a forked process, because its threads do not survive a fork (" +
                backend_reason +
                "): start processes with multiprocessing.get_context('spawn') or 'forkserver'");
  }
}

void Evaluator::Impl::set_list(const NeighborList& list) {
  const TorchThreads one_thread(1);
  list_ = {};  // one that is refused must not leave the one before in use
  list_ = checked_list(list, rules);
  n_rows_ = position_rows(list_);
  list_is_up_ = false;
}

Evaluation Evaluator::Impl::evaluate_positions(const at::Tensor& positions, const at::Tensor& cells,
                                               const Request& request, GhostExchange* exchange) {
  if (!list_.types.defined()) throw Error("expected a list before positions, got none: call set_list first");
  refuse_after_fork();
  const TorchThreads one_thread(1);
  check_positions(list_, n_rows_, positions, cells);
  if (on_device_ == nullptr) return evaluate(graph_of_list(list_, positions, cells), request, exchange);
  if (!list_is_up_) {
    upload(list_);
    list_is_up_ = true;
  }
  return run_on_device(list_, positions, cells, request, exchange);
}

void Evaluator::Impl::upload(const NeighborList& list) {
  const c10::OptionalDeviceGuard device_guard(device_.is_cuda() ? std::optional<at::Device>(device_)
                                                                : std::nullopt);
  if (list.system_index.size(0) == 0) return;  // nothing will be evaluated
  try {
    on_device_->set_list(list);
  } catch (const std::exception& exception) {
    rethrow(exception, "uploading a neighbour list of " + std::to_string(list.edge_index.size(1)) +
                           " pairs to " + device_name);
  }
}

Evaluation Evaluator::Impl::run_on_device(const NeighborList& list, const at::Tensor& positions,
                                          const at::Tensor& cells, const Request& request,
                                          GhostExchange* exchange) {
  const c10::OptionalDeviceGuard device_guard(device_.is_cuda() ? std::optional<at::Device>(device_)
                                                                : std::nullopt);
  const int64_t n_node = list.types.size(0), n_local = list.system_index.size(0);
  check_exchange(n_node - n_local, exchange);
  conditions_->check(list.n_systems, n_node - n_local);
  if (n_local == 0) {
    run_without_atoms(n_node, list.n_systems, request.forces || request.virial || request.atom_virial,
                      exchange);
    return empty_result(n_node, n_local, list.n_systems, request);
  }
  Evaluation result;
  try {
    const at::NoGradGuard no_grad;
    result = on_device_->evaluate(positions, cells, request, exchange);
  } catch (const std::exception& exception) {
    rethrow(exception, "evaluating " + std::to_string(n_local) + " atoms and a list of " +
                           std::to_string(list.edge_index.size(1)) + " pairs on " + device_name);
  }
  check_finite(result, request);
  check_sums(result);
  return result;
}

void Evaluator::Impl::run(const PreparedGraph& graph, const at::Tensor& system, const Request& request,
                          GhostExchange* exchange, Evaluation& result) {
  const bool gradients = request.forces || request.virial || request.atom_virial;
  const at::AutoGradMode grad_mode(gradients);
  // No profiling and no re-specialisation: edge and angle counts change from step to step.
  const torch::jit::GraphOptimizerEnabledGuard no_optimizer(false);
  const at::Tensor types = graph.types.to(device_), elements_of = types.remainder(rules.n_types),
                   edge_index = graph.edge_index.to(device_);
  const at::Tensor edge_vec = graph.edge_vec.to(device_), angle_index = graph.angle_index.to(device_);

  Segment geometry(geometry_, {edge_vec}, {gradients});
  geometry.forward({geometry.leaf(0), elements_of, edge_index, angle_index}, 5);
  std::array<at::Tensor, 5> shape;  // edge_input, sw, h, cos, asw, in the dtype of the network
  for (size_t i = 0; i < 5; ++i) shape[i] = geometry.output(i).to(dtype_);
  if (!gradients) geometry = Segment(geometry_, {}, {});

  const at::Tensor features = [&] {
    const at::NoGradGuard no_grad;
    return group_features(graph, exchange);
  }();

  Segment embedding(embedding_, {shape[0], shape[3]}, {gradients, gradients});
  std::vector<IValue> inputs{elements_of, embedding.leaf(0), embedding.leaf(1)};
  if (conditions_->shift().defined()) {
    inputs.insert(inputs.end(), {conditions_->shift().to(device_), types.div(rules.n_types, "floor")});
  }
  embedding.forward(std::move(inputs), 3);
  at::Tensor v = embedding.output(0), e = embedding.output(1), a = embedding.output(2);
  // Node features come from the types alone, so layer 0 usually has no gradient to pass on.
  bool v_requires_grad = embedding.output_requires_grad(0);

  std::vector<Segment> segments;
  segments.reserve(layers.size());
  for (size_t l = 0; l < layers.size(); ++l) {
    if (l > 0) v = with_ghosts(graph, v, exchange);
    Segment layer(layers[l], {v, e, a, shape[1], shape[2], shape[4]},
                  {v_requires_grad, gradients, gradients, gradients, gradients, gradients});
    layer.forward(
        {layer.leaf(0), layer.leaf(1), layer.leaf(2), layer.leaf(3), layer.leaf(4), layer.leaf(5), edge_index,
         angle_index, graph.n_local, graph.node_splits, graph.edge_splits, graph.angle_splits, features},
        3);
    v = layer.output(0);
    e = layer.output(1);
    a = layer.output(2);
    v_requires_grad = gradients;  // also where this rank sees no edge: ghosts depend on other ranks' edges
    if (gradients) segments.push_back(std::move(layer));
  }
  v = v.narrow(0, 0, graph.n_local);

  Segment readout(readout_, {v}, {v_requires_grad});
  readout.forward(readout_arguments(readout.leaf(0), types.narrow(0, 0, graph.n_local)), 1);
  const at::Tensor energies = readout.output(0);
  result.energies =
      energies.to(at::kCPU, at::kDouble).reshape({graph.n_local}).index_select(0, graph.model_row);
  if (!gradients) return;
  if (graph.n_edge > 0) check_differentiated(readout.output_requires_grad(0));

  std::vector<at::Tensor> down = readout.backward({at::ones_like(energies)});
  at::Tensor dv = down[0], de, da, d_sw, d_h, d_asw;
  while (!segments.empty()) {
    down = segments.back().backward({dv, de, da});
    segments.pop_back();
    dv = segments.empty() ? down[0] : without_ghosts(graph, down[0], exchange);
    de = down[1];
    da = down[2];
    accumulate(d_sw, down[3]);
    accumulate(d_h, down[4]);
    accumulate(d_asw, down[5]);
  }
  down = embedding.backward({dv, de, da});
  at::Tensor d_edge_input, d_cos;
  accumulate(d_edge_input, down[0]);
  accumulate(d_cos, down[1]);
  at::Tensor g = geometry.backward({d_edge_input, d_sw, d_h, d_cos, d_asw})[0];
  if (graph.n_edge > 0) check_differentiated(g.defined());
  if (!g.defined()) return;  // no edges: forces and virial stay zero
  g = g.detach();
  if (device_.is_cpu()) {
    scatter_on_cpu(graph, system.const_data_ptr<int64_t>(), g, request, result);
  } else {
    scatter_on_device(graph, system, edge_index, edge_vec, g, request, result);
  }
}

/// Energies (n_local,) of node features in model order, and their gradient if `dv` is given.
at::Tensor Evaluator::Impl::read_out(const at::Tensor& v, const at::Tensor& types, at::Tensor* dv) {
  if (fitting_ != nullptr) return fitting_->evaluate(v, types, dv);
  const TorchThreads torch_threads(threads_.size());
  const at::AutoGradMode grad_mode(dv != nullptr);
  Segment readout(readout_, {v}, {dv != nullptr});
  readout.forward(readout_arguments(readout.leaf(0), types), 1);
  const at::Tensor energies = readout.output(0);
  if (dv != nullptr) *dv = readout.backward({at::ones_like(energies)})[0];
  if (dv != nullptr) check_differentiated(dv->defined());
  return energies.to(at::kDouble).reshape({v.size(0)});
}

void Evaluator::Impl::run_fused(const PreparedGraph& graph, const at::Tensor& system, const Request& request,
                                GhostExchange* exchange, Evaluation& result) {
  const bool gradients = request.forces || request.virial || request.atom_virial;
  const at::AutoGradMode grad_mode(false);
  const torch::jit::GraphOptimizerEnabledGuard no_optimizer(false);
  FusedModel::Exchange extend, reduce;
  if (exchange != nullptr) {
    extend = [&](const at::Tensor& v) { return with_ghosts(graph, v, exchange); };
    reduce = [&](const at::Tensor& dv) { return without_ghosts(graph, dv, exchange); };
  }
  auto mark = std::chrono::steady_clock::now();
  const at::Tensor v = fused_->forward(graph, group_features(graph, exchange), extend, gradients);
  result.timings.emplace_back("forward", seconds_since(mark));
  mark = std::chrono::steady_clock::now();
  at::Tensor dv;
  const at::Tensor energies = read_out(v, graph.types.narrow(0, 0, graph.n_local), gradients ? &dv : nullptr);
  result.energies = energies.index_select(0, graph.model_row);
  result.timings.emplace_back("readout", seconds_since(mark));
  if (!gradients) {
    fused_->take_timings(result.timings);
    return;
  }
  mark = std::chrono::steady_clock::now();
  const at::Tensor g = fused_->backward(graph, dv, reduce);
  result.timings.emplace_back("backward", seconds_since(mark));
  fused_->take_timings(result.timings);
  scatter_on_cpu(graph, system.const_data_ptr<int64_t>(), g, request, result);
}

std::vector<at::Tensor> Evaluator::Impl::run_layer(const AtomicGraph& graph, int64_t layer,
                                                   const std::vector<at::Tensor>& inputs,
                                                   const std::vector<at::Tensor>& gradients) {
  if (fused_ == nullptr) throw Error("run_layer: no fused kernels here (" + backend_reason + ")");
  if (layer < 0 || layer >= static_cast<int64_t>(layers.size())) {
    throw Error("expected a layer in [0, " + std::to_string(layers.size()) + "), got " +
                std::to_string(layer));
  }
  if (inputs.size() != 6 || (!gradients.empty() && gradients.size() != 3)) {
    throw Error("expected 6 inputs and 0 or 3 gradients, got " + std::to_string(inputs.size()) + " and " +
                std::to_string(gradients.size()));
  }
  threads_.resize(num_threads());
  const TorchThreads one_thread(1);
  const at::NoGradGuard no_grad;
  const PreparedGraph prepared = prepare_graph(graph, rules, false);
  const LayerTensors in{inputs[0], inputs[1], inputs[2], inputs[3], inputs[4], inputs[5]};
  const LayerTensors out = fused_->one_layer(prepared, element_features_, layer, in);
  if (gradients.empty()) return {out.v, out.e, out.a};
  const LayerTensors d =
      fused_->one_layer_backward(layer, in, {gradients[0], gradients[1], gradients[2], {}, {}, {}});
  return {d.v, d.e, d.a, d.sw, d.h, d.asw};
}

Evaluator::Evaluator(const std::string& path, const std::string& device, const std::string& dtype,
                     const std::string& precision, bool deterministic)
    : impl_(std::make_unique<Impl>(path, device, dtype, precision, deterministic)) {}
Evaluator::~Evaluator() = default;
Evaluator::Evaluator(Evaluator&&) noexcept = default;
Evaluator& Evaluator::operator=(Evaluator&&) noexcept = default;

Evaluation Evaluator::evaluate(const AtomicGraph& graph, const Request& request, GhostExchange* exchange) {
  const CleanState clean;
  return impl_->evaluate(graph, request, exchange);
}

/// Precision of the reference frames' check: keys.REFERENCE_TOLERANCE of Python, and what reduced products
/// add.
static double reference_tolerance(at::ScalarType dtype, ProductPrecision precision) {
  if (dtype == at::kDouble) return 1e-8;
  return precision == ProductPrecision::tf32 ? 2e-3 : 2e-5;
}

void Evaluator::Impl::check_frames(const std::vector<const ReferenceFrame*>& frames) {
  const auto [charge_spin, fparam] = conditions_of_frames(frames);
  set_conditions(charge_spin, fparam);
  const AtomicGraph graph = reference_graph(frames, rules.cutoff);
  compare_with_reference(frames, evaluate(graph, {}, nullptr), reference_tolerance(dtype_, precision_),
                         "on " + device_name + " in " + dtype_name);
}

void Evaluator::Impl::check_reference(const std::vector<std::string>& wanted) {
  std::vector<bool> types(elements.size(), wanted.empty());
  for (size_t t = 0; t < elements.size(); ++t) {
    if (std::find(wanted.begin(), wanted.end(), elements[t]) != wanted.end()) types[t] = true;
  }
  const std::vector<ReferenceFrame> frames = read_reference(reference_, elements);
  const CheckEnds ends(*this);
  const ReferenceFrame& cheapest = frames[cheapest_frame(frames)];
  check_frames({&cheapest});
  std::vector<const ReferenceFrame*> chosen;
  std::set<int64_t> present;
  for (const size_t k : covering_frames(frames, types)) {
    chosen.push_back(&frames[k]);
    present.insert(frames[k].types.begin(), frames[k].types.end());
  }
  // where the model takes conditions, other ones as well
  for (const ReferenceFrame& frame : frames) {
    if (frame.types.size() < 2) continue;
    if (frame.charge_spin == chosen[0]->charge_spin && frame.fparam == chosen[0]->fparam) continue;
    chosen.push_back(&frame);
    break;
  }
  // Nobody waits for the weights of the whole periodic table to be laid out: `moecalc verify` checks them
  // all.
  const int64_t n_packed = n_packed_groups();
  const int64_t bytes = fused_ != nullptr       ? fused_->weight_bytes()
                        : on_device_ != nullptr ? on_device_->weight_bytes()
                                                : 0;
  const int64_t needed = n_packed == 0 ? 0 : bytes / n_packed * static_cast<int64_t>(present.size());
  if (needed <= most_checked_weights) check_frames(chosen);
}

void Evaluator::set_conditions(const at::Tensor& charge_spin, const at::Tensor& fparam) {
  const CleanState clean;
  impl_->set_conditions(charge_spin, fparam);
}
AppliedConditions Evaluator::set_conditions(const GivenConditions& given) {
  const CleanState clean;
  return impl_->set_conditions(given);
}

void Evaluator::check_reference(const std::vector<std::string>& elements) {
  const CleanState clean;
  impl_->check_reference(elements);
}

void Evaluator::set_list(const NeighborList& list) {
  const CleanState clean;
  impl_->set_list(list);
}

Evaluation Evaluator::evaluate_positions(const at::Tensor& positions, const at::Tensor& cells,
                                         const Request& request, GhostExchange* exchange) {
  const CleanState clean;
  return impl_->evaluate_positions(positions, cells, request, exchange);
}

void Evaluator::set_num_threads(int64_t n) {
  if (n < 0 || n > 4096) {
    throw Error("expected a number of threads from 1 to 4096, or 0 for the default, got " +
                std::to_string(n));
  }
  impl_->set_num_threads(static_cast<int>(n));
}
int64_t Evaluator::num_threads() const { return impl_->num_threads(); }
bool Evaluator::keeps_lists() const { return impl_->keeps_lists(); }
const std::string& Evaluator::precision() const { return impl_->precision_name; }
int64_t Evaluator::estimate_bytes(int64_t n_node, int64_t n_edge, int64_t n_angle) const {
  return impl_->estimate_bytes(n_node, n_edge, n_angle);
}

const std::vector<std::string>& Evaluator::elements() const { return impl_->elements; }
double Evaluator::cutoff() const { return impl_->rules.cutoff; }
double Evaluator::angle_cutoff() const { return impl_->rules.angle_cutoff; }
const std::string& Evaluator::dtype() const { return impl_->dtype_name; }
const std::string& Evaluator::device() const { return impl_->device_name; }
int64_t Evaluator::n_layers() const { return static_cast<int64_t>(impl_->layers.size()); }
const std::string& Evaluator::backend() const { return impl_->backend; }
const std::string& Evaluator::backend_reason() const { return impl_->backend_reason; }
int64_t Evaluator::buffer_bytes() const { return impl_->buffer_bytes(); }
std::vector<at::Tensor> Evaluator::run_layer(const AtomicGraph& graph, int64_t layer,
                                             const std::vector<at::Tensor>& inputs,
                                             const std::vector<at::Tensor>& gradients) {
  const CleanState clean;
  return impl_->run_layer(graph, layer, inputs, gradients);
}
const std::string& Evaluator::metadata() const { return impl_->metadata; }
std::string Evaluator::record(const std::string& name) const { return impl_->file->record(name); }
int64_t Evaluator::n_packed_groups() const { return impl_->n_packed_groups(); }
void Evaluator::release_weights() { impl_->release_weights(); }

// --- version.h -----------------------------------------------------------------------------------

const char* version() { return MOECALC_VERSION; }

std::string build_info() {
  return std::string("{\"moecalc\": \"") + version() +
         "\", \"torch\": \"" TORCH_VERSION "\", \"compiler\": \"" +
#if defined(__clang__)
         "clang " __clang_version__
#else
         "gcc " __VERSION__
#endif
         "\", \"cuda\": " +
         (MOECALC_WITH_CUDA ? "true" : "false") +  // torch's own
         ", \"cuda_kernels\": \"" MOECALC_CUDA_ARCHITECTURES "\"" +
         ", \"package_format\": " + std::to_string(package_format_version) + "}";
}

}  // namespace moecalc
