// The package's own TorchScript code, run by torch: to compare the kernels with, and for verification.
#include <ATen/ATen.h>
#include <ATen/DeviceGuard.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/grad_mode.h>
#include <torch/csrc/jit/api/module.h>
#include <torch/csrc/jit/runtime/graph_executor.h>
#include <torch/cuda.h>
#include <torch/version.h>
#include <unistd.h>

#include <array>
#include <cstring>
#include <exception>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "backends/laps.h"
#include "backends/torchscript/clean_state.h"
#include "backends/torchscript/interface.h"
#include "backends/torchscript/package_reader.h"
#include "backends/torchscript/torch_threads.h"
#include "moecalc/text.h"

#ifndef MOECALC_TORCH_VERSION  // the build of torch as well: "2.13.0+cpu"
#define MOECALC_TORCH_VERSION TORCH_VERSION
#endif

// Of torch since 2.9.
extern "C" uint64_t aoti_torch_abi_version() __attribute__((weak));

namespace moecalc {
namespace {

using torch::jit::IValue;
using torch::jit::Module;

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

/// In a handler of `exception`: it goes on as one of ours.
[[noreturn]] void rethrow(const std::exception& exception, const std::string& context) {
  if (dynamic_cast<const Error*>(&exception) != nullptr) throw;
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
        "forces: package the checkpoint again");
  }
}

// --- devices and types ---------------------------------------------------------------------------

at::Device torch_device(const Device& device) {
  if (!device.is_cuda) return {at::kCPU};
  if (!torch::cuda::is_available()) {
    throw Error("device '" + device.name() +
                "': torch " MOECALC_TORCH_VERSION
                " finds no CUDA device: use device 'cpu' or install a CUDA build of torch and its driver");
  }
  const auto n_devices = static_cast<int64_t>(torch::cuda::device_count());
  if (device.index < 0 || device.index >= n_devices) {
    throw Error("expected `device` 'cuda:N' with N in [0, " + std::to_string(n_devices) + "), got '" +
                device.name() + "'");
  }
  return {at::kCUDA, static_cast<at::DeviceIndex>(device.index)};
}

at::ScalarType torch_type(Dtype dtype) {
  switch (dtype) {
    case Dtype::float32:
      return at::kFloat;
    case Dtype::float64:
      return at::kDouble;
    case Dtype::int64:
      return at::kLong;
    case Dtype::boolean:
      break;
  }
  return at::kBool;
}

Dtype dtype_of_tensor(const at::Tensor& tensor) {
  if (tensor.scalar_type() == at::kDouble) return Dtype::float64;
  if (tensor.scalar_type() == at::kFloat) return Dtype::float32;
  throw Error(std::string("expected model segments of float32 or float64, got ") +
              c10::toString(tensor.scalar_type()) + ": package the checkpoint again");
}

at::TensorOptions cpu_double() { return at::TensorOptions().dtype(at::kDouble).device(at::kCPU); }

/// The numbers of an array, not copied. Undefined if the array is.
at::Tensor tensor_of(const Array& array) {
  if (!array.defined()) return {};
  return at::from_blob(array.bytes_data(), array.shape(),
                       at::TensorOptions().dtype(torch_type(array.dtype())));
}

at::Tensor tensor_of(const std::vector<int64_t>& values) {
  return at::from_blob(const_cast<int64_t*>(values.data()), {static_cast<int64_t>(values.size())},
                       at::TensorOptions().dtype(at::kLong));
}

/// The numbers of a tensor on the CPU, which the array keeps alive.
Array array_of(const at::Tensor& tensor) {
  const auto owner = std::make_shared<at::Tensor>(tensor.contiguous());
  return Array::view(owner->mutable_data_ptr(), owner->sizes().vec(), dtype_of_tensor(*owner), owner);
}

/// Copies a tensor of float64 over the numbers of a result.
void copy_to(const at::Tensor& tensor, const Array& result) {
  const at::Tensor rows = tensor.to(at::kCPU, at::kDouble).contiguous();
  if (rows.numel() > 0) {
    std::memcpy(result.data<double>(), rows.const_data_ptr<double>(), sizeof(double) * rows.numel());
  }
}

/// change(tensor) for all parameters and buffers.
template <class Function>
void for_tensors(const Module& module, const Function& change) {
  for (at::Tensor tensor : module.parameters()) change(tensor);
  for (at::Tensor tensor : module.buffers()) change(tensor);
}

/// Sets the dtype of all floating-point parameters and buffers (Module::to converts integer buffers too).
void convert(const Module& module, at::ScalarType dtype) {
  for_tensors(module, [&](at::Tensor& tensor) {
    if (tensor.is_floating_point()) tensor.set_data(tensor.to(dtype));
  });
}

// --- segments ------------------------------------------------------------------------------------

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
    std::vector<at::Tensor> inputs;
    std::vector<at::Tensor> outputs;
    std::vector<at::Tensor> gradients;
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
  std::vector<at::Tensor> leaves_;
  std::vector<at::Tensor> outputs_;
};

void accumulate(at::Tensor& sum, const at::Tensor& gradient) {
  if (!gradient.defined()) return;
  sum = sum.defined() ? sum + gradient.to(at::kDouble) : gradient.to(at::kDouble);
}

/// A graph as the segments take it, on their device. On the CPU it shares the memory of the graph.
struct GraphTensors {
  GraphTensors(const PreparedGraph& graph, int64_t n_types, const at::Device& device)
      : types(tensor_of(graph.types).to(device)),
        elements(types.remainder(n_types)),
        conditions(types.div(n_types, "floor")),
        edge_index(at::stack({tensor_of(graph.centre), tensor_of(graph.neighbor)}).to(device)),
        edge_vec(at::from_blob(const_cast<double*>(graph.edge_vec.data()), {graph.n_edge, 3}, cpu_double())
                     .to(device)) {
    const AngleIndex angles = moecalc::angle_index(graph);
    angle_index = at::stack({tensor_of(angles.first), tensor_of(angles.second)}).to(device);
  }

  at::Tensor types;        // (n_node,) condition * n_types + element
  at::Tensor elements;     // (n_node,)
  at::Tensor conditions;   // (n_node,)
  at::Tensor edge_index;   // (2, n_edge)
  at::Tensor edge_vec;     // (n_edge, 3) float64
  at::Tensor angle_index;  // (2, n_angle)
};

/// `scatter_gradients` on a device: results leave it only once they are summed.
void scatter_on_device(const PreparedGraph& graph, const GraphTensors& in, const at::Tensor& gradient,
                       const Request& request, Evaluation& result) {
  const at::Device device = gradient.device();
  const at::Tensor row = tensor_of(graph.engine_row).to(device);
  const at::Tensor centre = row.index_select(0, in.edge_index[0]);
  const at::Tensor neighbor = row.index_select(0, in.edge_index[1]);
  const auto options = cpu_double().device(device);
  if (request.forces) {
    at::Tensor forces = at::zeros({graph.n_node, 3}, options);
    forces.index_add_(0, centre, gradient);
    forces.index_add_(0, neighbor, -gradient);
    copy_to(forces, result.forces);
  }
  if (!request.virial && !request.atom_virial) return;
  const at::Tensor share = in.edge_vec.unsqueeze(2) * gradient.unsqueeze(1);
  if (request.virial && graph.n_systems == 1) {
    copy_to(share.sum(0, /*keepdim=*/true).neg(), result.virial);
  } else if (request.virial) {
    const at::Tensor system = tensor_of(graph.system).to(device).index_select(0, in.edge_index[0]);
    copy_to(at::zeros({graph.n_systems, 3, 3}, options).index_add_(0, system, -share), result.virial);
  }
  if (request.atom_virial) {
    copy_to(at::zeros({graph.n_node, 3, 3}, options).index_add_(0, neighbor, -share), result.atom_virial);
  }
}

// --- the backend ---------------------------------------------------------------------------------

class TorchScriptBackend final : public Backend {
 public:
  explicit TorchScriptBackend(const BackendInputs& inputs);

  void set_tables(const TypeTables& tables) override;
  void set_list(const NeighborList& list) override;
  Evaluation evaluate(const Array& positions, const Array& cells, const Request& request,
                      GhostExchange* exchange) override;

  std::string name() const override { return "torchscript"; }
  bool is_fast() const override { return false; }
  bool survives_fork() const override { return false; }
  int64_t bytes() const override { return 0; }

 private:
  class Run;

  void load(const BackendInputs& inputs);
  void check_model(const Module& model) const;
  void place(const Module& model, bool converted) const;
  void run(const PreparedGraph& graph, const Request& request, GhostExchange* exchange, Evaluation& result);
  at::Tensor features_of_elements();
  at::Tensor group_features(const PreparedGraph& graph, GhostExchange* exchange);
  std::vector<IValue> readout_arguments(const at::Tensor& node, const GraphTensors& in,
                                        int64_t n_local) const;
  at::Tensor extended(const PreparedGraph& graph, const at::Tensor& node, GhostExchange* exchange) const;
  at::Tensor reduced(const PreparedGraph& graph, const at::Tensor& gradient, GhostExchange* exchange) const;
  void refuse_after_fork() const;
  c10::OptionalDeviceGuard device_guard() const {
    return c10::OptionalDeviceGuard(device_.is_cuda() ? std::optional<at::Device>(device_) : std::nullopt);
  }

  const Architecture& architecture_;
  const std::string path_;
  ThreadPool& threads_;  // only their number
  const at::Device device_;
  const std::string device_name_;
  const at::ScalarType dtype_;  // of the network
  const pid_t process_ = getpid();
  Module geometry_;
  Module embedding_;
  Module readout_;
  std::vector<Module> layers_;
  TypeTables tables_;
  at::Tensor shift_;             // of tables_, on the device; undefined: none
  at::Tensor fitting_inputs_;    // likewise
  at::Tensor element_features_;  // router input where groups are types: the same in every call
  GraphBuilder builder_;
};

TorchScriptBackend::TorchScriptBackend(const BackendInputs& inputs)
    : architecture_(inputs.package.architecture),
      path_(inputs.package.file->path()),
      threads_(inputs.threads),
      device_(torch_device(inputs.options.device)),
      device_name_(inputs.options.device.name()),
      dtype_(torch_type(inputs.dtype)) {
  try {
    load(inputs);
  } catch (const std::exception& exception) {
    rethrow(exception, path_ + ": cannot be loaded on " + device_name_);
  }
}

void TorchScriptBackend::load(const BackendInputs& inputs) {
  const CleanState clean;
  const TorchThreads one_thread(1);
  const at::NoGradGuard no_grad;
  const torch::jit::GraphOptimizerEnabledGuard no_optimizer(false);
  const Module model = load_module(*inputs.package.file);
  check_model(model);
  for (at::Tensor parameter : model.parameters()) parameter.set_requires_grad(false);
  for (const auto& layer : model.attr("layers").toModule().named_children()) layers_.push_back(layer.value);
  geometry_ = model.attr("geometry").toModule();
  embedding_ = model.attr("embedding").toModule();
  readout_ = model.attr("readout").toModule();
  place(model, /*converted=*/inputs.options.dtype.has_value());
}

/// The lists are made by the rules of the architecture, so the code must be of the same model.
void TorchScriptBackend::check_model(const Module& model) const {
  const auto refuse = [&](const char* name) {
    throw Error(
        path_ + ": expected `" + name +
        "` of the TorchScript code to be that of architecture.json, got another: edited file, package "
        "the checkpoint again");
  };
  std::vector<std::string> elements;
  for (const IValue& element : model.attr("elements").toListRef()) elements.push_back(element.toStringRef());
  const GraphRules& rules = architecture_.rules;
  if (elements != architecture_.elements) refuse("elements");
  if (model.attr("cutoff").toDouble() != rules.cutoff) refuse("cutoff");
  if (model.attr("angle_cutoff").toDouble() != rules.angle_cutoff) refuse("angle_cutoff");
  const char* level = rules.group_by_system ? "configuration" : "element";
  if (model.attr("routing_level").toStringRef() != level) refuse("routing_level");
  const auto n_layers = model.attr("layers").toModule().named_children().size();
  if (n_layers != architecture_.layers.size()) refuse("layers");
}

/// Tensors in the dtype that was asked for, but not geometry and not the energy shifts, which are float64
/// whatever the dtype of the network; and on the device.
void TorchScriptBackend::place(const Module& model, bool converted) const {
  if (converted) {
    convert(embedding_, dtype_);
    for (const Module& layer : layers_) convert(layer, dtype_);
    convert(readout_.attr("net").toModule(), dtype_);
  }
  if (device_.is_cpu()) return;
  for_tensors(model, [&](at::Tensor& tensor) { tensor.set_data(tensor.to(device_)); });
}

/// What cannot work in a process that was forked would wait for threads that are gone.
void TorchScriptBackend::refuse_after_fork() const {
  if (device_.is_cuda() && process_ != getpid()) {
    throw Error("device '" + device_name_ +
                "' cannot be used in a forked process by a calculator that was made before the fork: start "
                "processes with multiprocessing.get_context('spawn') or 'forkserver', or make the calculator "
                "in each of them");
  }
  if (is_forked() && device_.is_cpu()) {
    throw Error(
        "TorchScript cannot run in a forked process, because its threads do not survive a fork (backend "
        "'torchscript'): start processes with multiprocessing.get_context('spawn') or 'forkserver'");
  }
}

void TorchScriptBackend::set_tables(const TypeTables& tables) {
  const CleanState clean;
  const TorchThreads one_thread(1);
  const c10::OptionalDeviceGuard on_device = device_guard();
  const at::NoGradGuard no_grad;
  const torch::jit::GraphOptimizerEnabledGuard no_optimizer(false);
  builder_.clear();
  tables_ = tables;
  try {
    const auto on = [&](const Array& rows) {
      return rows.defined() ? tensor_of(rows).to(device_, at::kDouble, false, /*copy=*/true) : at::Tensor();
    };
    shift_ = on(tables_.shift);
    fitting_inputs_ = on(tables_.fitting_inputs);
    element_features_ = tables_.rules.group_by_system ? at::Tensor() : features_of_elements();
  } catch (const std::exception& exception) {
    rethrow(exception, "setting " + std::to_string(tables.n_conditions) + " conditions");
  }
}

/// Router input of every type, or of every type under every condition.
at::Tensor TorchScriptBackend::features_of_elements() {
  const int64_t n_types = tables_.rules.n_types;
  const at::Tensor identity = at::eye(n_types, at::TensorOptions().dtype(dtype_).device(device_));
  std::vector<IValue> arguments{identity};
  if (tables_.rules.group_by_condition) {
    arguments = {identity.repeat({tables_.n_conditions, 1}), shift_.repeat_interleave(n_types, 0).to(dtype_)};
  }
  return embedding_.get_method("group_features")(std::move(arguments)).toTensor();
}

/// (G, n_dim) router input of the groups of a graph.
at::Tensor TorchScriptBackend::group_features(const PreparedGraph& graph, GhostExchange* exchange) {
  const GraphRules& rules = tables_.rules;
  if (!rules.group_by_system) return element_features_;
  const at::NoGradGuard no_grad;
  const Array fractions = composition_of(graph, rules.n_types, exchange);
  const at::Tensor composition = tensor_of(fractions);
  std::vector<IValue> arguments{composition.to(device_, dtype_)};
  if (architecture_.conditions.routed) {
    const at::Tensor of_system = tensor_of(rules.condition_of_system).to(device_);
    const at::Tensor rows = shift_.index_select(0, of_system);
    arguments.emplace_back(rows.expand({composition.size(0), -1}).to(dtype_));
  }
  return embedding_.get_method("group_features")(std::move(arguments)).toTensor();
}

/// Of the scripted readout, for owned nodes in model order.
std::vector<IValue> TorchScriptBackend::readout_arguments(const at::Tensor& node, const GraphTensors& in,
                                                          int64_t n_local) const {
  const auto owned = [&](const at::Tensor& rows) { return rows.narrow(0, 0, n_local); };
  if (!architecture_.conditions.taken()) return {node, owned(in.elements)};
  const auto optional = [](const at::Tensor& rows) { return rows.defined() ? IValue(rows) : IValue(); };
  return {node, owned(in.elements), owned(in.conditions), optional(fitting_inputs_), optional(shift_)};
}

/// (n_local, width) in model order -> (n_node, width): ghosts get the features of their owners.
at::Tensor TorchScriptBackend::extended(const PreparedGraph& graph, const at::Tensor& node,
                                        GhostExchange* exchange) const {
  if (exchange == nullptr) return node;
  const Array rows = with_ghosts(graph, array_of(node.cpu()), exchange);
  if (graph.n_node == graph.n_local) return node;
  return tensor_of(rows).to(device_, node.scalar_type(), /*non_blocking=*/false, /*copy=*/true);
}

/// Gradient of (n_node, width) rows -> of the owned ones, with what other ranks' ghosts contribute.
at::Tensor TorchScriptBackend::reduced(const PreparedGraph& graph, const at::Tensor& gradient,
                                       GhostExchange* exchange) const {
  if (exchange == nullptr) return gradient;
  const at::Tensor all = gradient.defined()
                             ? gradient.cpu()
                             : at::zeros({graph.n_node, architecture_.n_dim}, cpu_double().dtype(dtype_));
  const Array rows = without_ghosts(graph, array_of(all), exchange);
  return tensor_of(rows).to(device_, dtype_, /*non_blocking=*/false, /*copy=*/true);
}

void TorchScriptBackend::set_list(const NeighborList& list) { builder_.set_list(list, tables_.rules); }

Evaluation TorchScriptBackend::evaluate(const Array& positions, const Array& cells, const Request& request,
                                        GhostExchange* exchange) {
  refuse_after_fork();
  const CleanState clean;
  const TorchThreads torch_threads(threads_.size());
  const c10::OptionalDeviceGuard on_device = device_guard();
  Laps laps;
  const PreparedGraph& graph = builder_.prepare(positions, cells);
  Evaluation result = empty_result(graph, request);
  result.timings.emplace_back("graph", laps.next());
  try {
    run(graph, request, exchange, result);
  } catch (const std::exception& exception) {
    rethrow(exception, "evaluating " + std::to_string(graph.n_local) + " atoms, " +
                           std::to_string(graph.n_edge) + " edges and " + std::to_string(graph.n_angle) +
                           " angles on " + device_name_);
  }
  return result;
}

/// One evaluation of the scripted model, segment by segment.
class TorchScriptBackend::Run {
 public:
  Run(TorchScriptBackend& backend, const PreparedGraph& graph, bool gradients, GhostExchange* exchange)
      : backend_(backend),
        graph_(graph),
        gradients_(gradients),
        exchange_(exchange),
        in_(graph, backend.tables_.rules.n_types, backend.device_),
        geometry_(backend.geometry_, {in_.edge_vec}, {gradients}) {}

  const GraphTensors& in() const { return in_; }

  /// Energies of atoms in model order, (n_local,).
  at::Tensor forward() {
    run_geometry();
    const at::Tensor features = backend_.group_features(graph_, exchange_);
    run_embedding();
    run_layers(features);
    node_ = node_.narrow(0, 0, graph_.n_local);
    readout_.emplace(backend_.readout_, std::vector<at::Tensor>{node_},
                     std::vector<bool>{node_has_gradient_});
    readout_->forward(backend_.readout_arguments(readout_->leaf(0), in_, graph_.n_local), 1);
    return readout_->output(0);
  }

  /// dE/d(edge_vec); undefined where no energy depends on an edge.
  at::Tensor backward() {
    if (graph_.n_edge > 0) check_differentiated(readout_->output_requires_grad(0));
    std::vector<at::Tensor> down = readout_->backward({at::ones_like(readout_->output(0))});
    at::Tensor d_node = down[0];
    at::Tensor d_edge;
    at::Tensor d_angle;
    at::Tensor d_switch_edge;
    at::Tensor d_directions;
    at::Tensor d_switch_angle;
    while (!layers_.empty()) {
      down = layers_.back().backward({d_node, d_edge, d_angle});
      layers_.pop_back();
      d_node = layers_.empty() ? down[0] : backend_.reduced(graph_, down[0], exchange_);
      d_edge = down[1];
      d_angle = down[2];
      accumulate(d_switch_edge, down[3]);
      accumulate(d_directions, down[4]);
      accumulate(d_switch_angle, down[5]);
    }
    down = embedding_->backward({d_node, d_edge, d_angle});
    at::Tensor d_edge_input;
    at::Tensor d_cosine;
    accumulate(d_edge_input, down[0]);
    accumulate(d_cosine, down[1]);
    at::Tensor d_vectors =
        geometry_.backward({d_edge_input, d_switch_edge, d_directions, d_cosine, d_switch_angle})[0];
    if (graph_.n_edge > 0) check_differentiated(d_vectors.defined());
    return d_vectors.defined() ? d_vectors.detach().contiguous() : d_vectors;
  }

 private:
  enum Invariant : size_t { edge_input, switch_edge, directions, cosine, switch_angle, n_invariant };

  void run_geometry() {
    geometry_.forward({geometry_.leaf(0), in_.elements, in_.edge_index, in_.angle_index}, n_invariant);
    for (size_t i = 0; i < n_invariant; ++i) shape_[i] = geometry_.output(i).to(backend_.dtype_);
    if (!gradients_) geometry_ = Segment(backend_.geometry_, {}, {});
  }

  void run_embedding() {
    embedding_.emplace(backend_.embedding_, std::vector<at::Tensor>{shape_[edge_input], shape_[cosine]},
                       std::vector<bool>{gradients_, gradients_});
    std::vector<IValue> inputs{in_.elements, embedding_->leaf(0), embedding_->leaf(1)};
    if (backend_.shift_.defined()) inputs.insert(inputs.end(), {backend_.shift_, in_.conditions});
    embedding_->forward(std::move(inputs), 3);
    node_ = embedding_->output(0);
    edge_ = embedding_->output(1);
    angle_ = embedding_->output(2);
    // Node features come from the types alone, so layer 0 usually has no gradient to pass on.
    node_has_gradient_ = embedding_->output_requires_grad(0);
  }

  void run_layers(const at::Tensor& features) {
    layers_.reserve(backend_.layers_.size());
    for (size_t index = 0; index < backend_.layers_.size(); ++index) {
      if (index > 0) node_ = backend_.extended(graph_, node_, exchange_);
      Segment layer(backend_.layers_[index],
                    {node_, edge_, angle_, shape_[switch_edge], shape_[directions], shape_[switch_angle]},
                    {node_has_gradient_, gradients_, gradients_, gradients_, gradients_, gradients_});
      layer.forward({layer.leaf(0), layer.leaf(1), layer.leaf(2), layer.leaf(3), layer.leaf(4), layer.leaf(5),
                     in_.edge_index, in_.angle_index, graph_.n_local, graph_.node_splits, graph_.edge_splits,
                     graph_.angle_splits, features},
                    3);
      node_ = layer.output(0);
      edge_ = layer.output(1);
      angle_ = layer.output(2);
      // also where this rank sees no edge: ghosts depend on other ranks' edges
      node_has_gradient_ = gradients_;
      if (gradients_) layers_.push_back(std::move(layer));
    }
  }

  TorchScriptBackend& backend_;
  const PreparedGraph& graph_;
  const bool gradients_;
  GhostExchange* exchange_;
  const GraphTensors in_;
  Segment geometry_;
  std::optional<Segment> embedding_;
  std::vector<Segment> layers_;
  std::optional<Segment> readout_;
  std::array<at::Tensor, n_invariant> shape_;  // invariants of the geometry, in the dtype of the network
  at::Tensor node_;
  at::Tensor edge_;
  at::Tensor angle_;
  bool node_has_gradient_ = false;
};

void TorchScriptBackend::run(const PreparedGraph& graph, const Request& request, GhostExchange* exchange,
                             Evaluation& result) {
  const bool gradients = request.gradients();
  const at::AutoGradMode grad_mode(gradients);
  // No profiling and no re-specialisation: edge and angle counts change from step to step.
  const torch::jit::GraphOptimizerEnabledGuard no_optimizer(false);
  Run run(*this, graph, gradients, exchange);
  const at::Tensor energies = run.forward();
  put_energies(graph, array_of(energies.to(at::kCPU, at::kDouble).reshape({graph.n_local})), result);
  if (!gradients) return;
  const at::Tensor d_vectors = run.backward();
  if (!d_vectors.defined()) return;  // no edges: forces and virial stay zero
  if (device_.is_cpu()) {
    scatter_gradients(graph, d_vectors.const_data_ptr<double>(), request, result);
  } else {
    scatter_on_device(graph, run.in(), d_vectors, request, result);
  }
}

}  // namespace
}  // namespace moecalc

namespace {
constexpr char marker[] = MOECALC_TORCH_MARKER MOECALC_TORCH_VERSION;
}

moecalc::Backend* moecalc_make_torchscript_backend(const moecalc::BackendInputs* inputs) {
  return new moecalc::TorchScriptBackend(*inputs);
}

const char* moecalc_torch_build() {
  static const std::string id = moecalc::torchscript::build_id();
  return id.c_str();
}

const char* moecalc_torch_version() { return marker + sizeof(MOECALC_TORCH_MARKER) - 1; }

const char* moecalc_running_torch() {
  static const std::string version = [] {
    if (aoti_torch_abi_version == nullptr) return std::string();
    const uint64_t number = aoti_torch_abi_version();
    return std::to_string(number >> 56) + "." + std::to_string(number >> 48 & 0xFF);
  }();
  return version.c_str();
}
