#include "moecalc/evaluator.h"

#include <unistd.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <exception>
#include <memory>
#include <new>
#include <optional>
#include <set>
#include <utility>

#include "backends/backend.h"
#include "core/default_arithmetic.h"
#include "core/threads.h"
#include "graph/graph.h"
#include "moecalc/text.h"
#include "package/architecture.h"
#include "package/conditions.h"
#include "package/reference_check.h"

namespace moecalc {

GhostExchange::~GhostExchange() = default;
void GhostExchange::exchange(void* /*sent*/, void* /*received*/, int64_t /*row_bytes*/, bool /*back*/) {
  throw Error("expected a ghost exchange with a plan, got one without: use forward() and reverse()");
}

namespace {

constexpr int64_t most_checked_weights = int64_t{256} << 20;  // bytes laid out for reference frames

/// Rethrows what is no error of ours as one, with what was being done.
[[noreturn]] void rethrow(const std::string& context) {
  try {
    throw;
  } catch (const Error&) {
    throw;
  } catch (const std::bad_alloc&) {
    throw OutOfMemoryError("out of memory " + context +
                           ": use fewer atoms per process, dtype float32 or a device with more memory");
  } catch (const std::exception& exception) {
    const std::string text = exception.what();
    throw Error(context + ": " + printable(text.substr(0, text.find('\n')), 400));
  }
}

void check_finite(const Evaluation& result, const Request& request) {
  const auto* energy = result.energies.data<double>();
  for (int64_t i = 0; i < result.energies.numel(); ++i) {
    if (!std::isfinite(energy[i])) {
      throw NotFiniteError("expected finite energies, got " + std::to_string(energy[i]) + " eV for atom " +
                               std::to_string(i) + ": its neighborhood is far outside of the training data",
                           i);
    }
  }
  for (int64_t k = 0; k < result.energy.numel(); ++k) {  // finite energies may have a sum that is not
    if (!std::isfinite(result.energy.data<double>()[k])) {
      throw NotFiniteError("expected finite energies, got a sum that overflows");
    }
  }
  if (!request.forces) return;
  double sum = 0.0;
  const auto* force = result.forces.data<double>();
  for (int64_t k = 0; k < result.forces.numel(); ++k) sum += force[k];
  if (!std::isfinite(sum)) {
    throw NotFiniteError(
        "expected finite forces, got NaN or infinity: the structure is far outside of the training data");
  }
}

/// `5.4`, in any locale.
std::string number_text(double value) {
  std::array<char, 32> text{};
  constexpr int n_digits = 6;
  const auto written =
      std::to_chars(text.data(), text.data() + text.size(), value, std::chars_format::general, n_digits);
  return {text.data(), written.ptr};
}

/// What to tell of an atom with `found` neighbors, of which training saw the nearest `limit`.
std::string crowded(int64_t found, double radius, int64_t limit) {
  return "an atom has " + std::to_string(found) + " neighbors within " + number_text(radius) +
         " A, but in training the model saw at most the nearest " + std::to_string(limit) +
         ": all of them are used, which is smooth, but differs from the training code, and the structure is "
         "denser than what the model knows";
}

/// Precision of the reference frames' check: REFERENCE of moecalc/tolerances.py, and what reduced products
/// add.
double reference_tolerance(Dtype dtype, Precision precision) {
  if (dtype == Dtype::float64) return 1e-8;
  return precision == Precision::tf32 || precision == Precision::fp16 ? 2e-3 : 2e-5;
}

}  // namespace

class Evaluator::Impl {
 public:
  Impl(const std::string& path, const EvaluatorOptions& wanted);

  Evaluation evaluate(const Array& positions, const Array& cells, const Request& request,
                      GhostExchange* exchange);
  void set_list(const NeighborList& list);
  void set_conditions(const Array& charge_spin, const Array& fparam);
  void check_reference(const std::vector<std::string>& wanted);
  void release_weights();
  std::vector<std::string> model_warnings() const;
  std::vector<std::string> structure_warnings(int64_t max_neighbors, int64_t max_angle_neighbors) const;
  int num_threads() const { return n_threads > 0 ? n_threads : default_threads(); }
  const Architecture& model() const { return package.architecture; }

  EvaluatorOptions options;
  LoadedPackage package;
  Dtype dtype = Dtype::float64;
  std::string dtype_name;
  std::string device_name;
  std::string precision_name;
  std::string backend_name;
  std::string backend_reason;
  ThreadPool threads;  // before what uses it
  std::unique_ptr<Backend> backend;
  int n_threads = 0;  // 0: default_threads()

 private:
  void choose_backend(const BackendInputs& inputs);
  void check_precision() const;
  void check_frames(const std::vector<const ReferenceFrame*>& frames);
  void check_exchange(int64_t n_ghost, const GhostExchange* exchange) const;
  void run_without_atoms(const Request& request, GhostExchange* exchange) const;
  void refuse_after_fork() const;

  const pid_t process_ = getpid();
  std::optional<Conditions> conditions_;
  bool has_list_ = false;     // the engine gave one that is valid
  bool list_is_set_ = false;  // the backend has it
  NeighborList list_;         // the engine's, shared
  int64_t n_rows_ = 0;        // of positions that the list names
};

Evaluator::Impl::Impl(const std::string& path, const EvaluatorOptions& wanted) : options(wanted) {
  device_name = options.device.name();
  precision_name = name_of(options.precision);
  const std::string context = printable(path, 400) + ": cannot be loaded on " + device_name;
  try {
    package = load_package(path);
    dtype = options.dtype.value_or(model().dtype);
    // the net has the dtype that was asked for, or its own
    if (options.dtype) package.architecture.readout.dtype = dtype;
    dtype_name = name_of(dtype);
    conditions_.emplace(model());
    threads.resize(num_threads());
    choose_backend({package, options, dtype, threads});
    backend_name = backend->name();
    if (!conditions_->taken()) backend->set_tables(conditions_->tables());
  } catch (...) {
    rethrow(context);
  }
}

void Evaluator::Impl::check_precision() const {
  if (options.precision == Precision::fp32) return;
  if (dtype == Dtype::float64) {
    throw Error("precision '" + precision_name +
                "' is for float32 networks, got dtype float64: use dtype float32, or precision fp32");
  }
  if (!options.device.is_cuda && options.backend != BackendKind::cuda_emulation) {
    throw Error("precision '" + precision_name +
                "' is for GPUs, got device 'cpu': use precision fp32, or device cuda");
  }
  if (options.backend == BackendKind::torchscript || options.backend == BackendKind::plain) {
    throw Error("precision '" + precision_name + "' needs the CUDA kernels, got backend '" +
                name_of(options.backend) + "': use precision fp32");
  }
}

void Evaluator::Impl::choose_backend(const BackendInputs& inputs) {
  const BackendKind choice = options.backend;
  const bool on_gpu = options.device.is_cuda;
  const bool cpu_only =
      choice == BackendKind::cuda_emulation || choice == BackendKind::fused || choice == BackendKind::plain;
  if (cpu_only && on_gpu) {
    throw Error(std::string("backend '") + name_of(choice) + "' runs on the CPU, got device '" + device_name +
                "': use device 'cpu'");
  }
  check_precision();
  if (choice == BackendKind::torchscript) {
    backend_reason = "backend torchscript was asked for";
    backend = make_torchscript_backend(inputs);
    return;
  }
  if (choice == BackendKind::plain) {
    backend_reason = "backend plain was asked for";
    backend = make_plain_backend(inputs);
    return;
  }
  const bool cuda = on_gpu || choice == BackendKind::cuda_emulation;
  backend = cuda ? make_cuda_backend(inputs, backend_reason) : make_fused_backend(inputs, backend_reason);
  if (backend != nullptr) return;
  const std::string not_covered =
      std::string("the ") + (cuda ? "CUDA" : "fused") + " kernels do not cover " + backend_reason;
  if (choice != BackendKind::automatic) {
    throw Error(std::string("backend '") + name_of(choice) + "': " + not_covered);
  }
  if (on_gpu) throw Error("device '" + device_name + "': " + not_covered + ": use device 'cpu'");
  backend = make_plain_backend(inputs);
}

void Evaluator::Impl::set_conditions(const Array& charge_spin, const Array& fparam) {
  if (!conditions_->set(charge_spin, fparam)) return;
  list_is_set_ = false;
  try {
    backend->set_tables(conditions_->tables());
  } catch (...) {
    conditions_->reset();  // half of them must not be used
    rethrow("setting " + std::to_string(conditions_->n_conditions()) + " conditions");
  }
}

void Evaluator::Impl::set_list(const NeighborList& list) {
  has_list_ = list_is_set_ = false;  // one that is refused must not leave the one before in use
  list_ = {};
  list_ = checked_list(list, model().rules);
  n_rows_ = position_rows(list_);
  has_list_ = true;
}

void Evaluator::Impl::release_weights() {
  backend->release_weights();
  list_is_set_ = false;
}

/// What cannot work in a process that was forked would wait for threads, or use a device, that are gone.
void Evaluator::Impl::refuse_after_fork() const {
  if (process_ == getpid() || backend->survives_fork()) return;
  const std::string what =
      options.device.is_cuda ? "device '" + device_name + "'" : "backend '" + backend_name + "'";
  throw Error(
      what +
      " cannot be used in a forked process by a calculator that was made before the fork: start "
      "processes with multiprocessing.get_context('spawn') or 'forkserver', or make the calculator in "
      "each of them");
}

void Evaluator::Impl::check_exchange(int64_t n_ghost, const GhostExchange* exchange) const {
  if (exchange == nullptr && n_ghost > 0 && model().layers.size() > 1) {
    throw Error("expected a GhostExchange for " + std::to_string(n_ghost) + " ghost atoms and a model of " +
                std::to_string(model().layers.size()) +
                " layers, got none: map periodic images to owned atoms or pass one");
  }
}

/// A rank that owns no atoms has nothing to compute, but the others wait for it in every exchange.
void Evaluator::Impl::run_without_atoms(const Request& request, GhostExchange* exchange) const {
  if (exchange == nullptr) return;
  if (model().rules.group_by_system) {
    exchange->sum(Array::zeros({list_.n_systems, model().n_types()}, Dtype::float64));
  }
  const Shape shape{list_.types.size(0), model().n_dim};
  for (size_t layer = 1; layer < model().layers.size(); ++layer)
    exchange->forward(Array::zeros(shape, dtype));
  if (!request.gradients()) return;
  for (size_t layer = 1; layer < model().layers.size(); ++layer)
    exchange->reverse(Array::zeros(shape, dtype));
}

Evaluation Evaluator::Impl::evaluate(const Array& positions, const Array& cells, const Request& request,
                                     GhostExchange* exchange) {
  if (!has_list_) throw Error("expected a list before positions, got none: call set_list first");
  refuse_after_fork();
  check_positions(list_, n_rows_, positions, cells);
  const int64_t n_node = list_.types.size(0);
  const int64_t n_local = list_.system_index.size(0);
  check_exchange(n_node - n_local, exchange);
  conditions_->check(list_.n_systems, n_node - n_local);
  if (n_local == 0) {
    run_without_atoms(request, exchange);
    return empty_result(n_node, n_local, list_.n_systems, request);
  }
  threads.resize(num_threads());
  Evaluation result;
  try {
    if (!list_is_set_) backend->set_list(list_);
    list_is_set_ = true;
    result = backend->evaluate(positions, cells, request, exchange);
  } catch (...) {
    rethrow("evaluating " + std::to_string(n_local) + " atoms and a list of " +
            std::to_string(list_.edge_index.size(1)) + " pairs on " + device_name);
  }
  check_finite(result, request);
  return result;
}

void Evaluator::Impl::check_frames(const std::vector<const ReferenceFrame*>& frames) {
  const auto [charge_spin, fparam] = conditions_of_frames(frames);
  set_conditions(charge_spin, fparam);
  const ListedEdges edges = reference_list(frames, model().rules);
  set_list(edges.list);
  compare_with_reference(frames, evaluate(edges.positions, {}, {}, nullptr),
                         reference_tolerance(dtype, options.precision),
                         "on " + device_name + " in " + dtype_name);
}

void Evaluator::Impl::check_reference(const std::vector<std::string>& wanted) {
  const std::vector<std::string>& elements = model().elements;
  std::vector<bool> types(elements.size(), wanted.empty());
  for (size_t t = 0; t < elements.size(); ++t) {
    if (std::find(wanted.begin(), wanted.end(), elements[t]) != wanted.end()) types[t] = true;
  }
  const std::vector<ReferenceFrame> frames = read_reference(package.reference, elements);
  /// What the check of the frames needed is nothing that the structures to come need.
  struct CheckEnds {
    explicit CheckEnds(Impl& impl) : impl(impl) {}
    CheckEnds(const CheckEnds&) = delete;
    CheckEnds& operator=(const CheckEnds&) = delete;
    ~CheckEnds() {
      impl.conditions_->reset();
      impl.has_list_ = impl.list_is_set_ = false;
      impl.list_ = {};
      try {
        impl.release_weights();
      } catch (...) {
        // a device that failed: the error on its way says more
      }
    }
    Impl& impl;
  };
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
  const int64_t n_packed = backend->n_packed_groups();
  const int64_t bytes = backend->weight_bytes();
  const int64_t needed = n_packed == 0 ? 0 : bytes / n_packed * static_cast<int64_t>(present.size());
  if (needed <= most_checked_weights) check_frames(chosen);
}

std::vector<std::string> Evaluator::Impl::model_warnings() const {
  if (backend->is_fast()) return {};
  const std::string how =
      backend_name == "torchscript" ? "through TorchScript" : "by the " + backend_name + " backend";
  const std::string kernels = options.device.is_cuda ? "CUDA" : "fused";
  return {"evaluated " + how + ", several times slower than the " + kernels + " kernels (" + backend_reason +
          ")"};
}

std::vector<std::string> Evaluator::Impl::structure_warnings(int64_t max_neighbors,
                                                             int64_t max_angle_neighbors) const {
  const Facts& facts = package.facts;
  std::vector<std::string> sentences;
  if (facts.edge_limit > 0 && max_neighbors > facts.edge_limit) {
    sentences.push_back(crowded(max_neighbors, model().rules.cutoff, facts.edge_limit));
  }
  if (facts.angle_limit > 0 && max_angle_neighbors > facts.angle_limit) {
    sentences.push_back(crowded(max_angle_neighbors, model().rules.angle_cutoff, facts.angle_limit));
  }
  return sentences;
}

Evaluator::Evaluator(const std::string& path, const EvaluatorOptions& options) {
  const DefaultArithmetic arithmetic;
  impl_ = std::make_unique<Impl>(path, options);
}
Evaluator::~Evaluator() = default;
Evaluator::Evaluator(Evaluator&&) noexcept = default;
Evaluator& Evaluator::operator=(Evaluator&&) noexcept = default;

void Evaluator::set_list(const NeighborList& list) { impl_->set_list(list); }
Evaluation Evaluator::evaluate(const Array& positions, const Array& cells, const Request& request,
                               GhostExchange* exchange) {
  const DefaultArithmetic arithmetic;
  return impl_->evaluate(positions, cells, request, exchange);
}
void Evaluator::check_reference(const std::vector<std::string>& elements) {
  const DefaultArithmetic arithmetic;
  impl_->check_reference(elements);
}
void Evaluator::set_conditions(const Array& charge_spin, const Array& fparam) {
  const DefaultArithmetic arithmetic;
  impl_->set_conditions(charge_spin, fparam);
}
AppliedConditions Evaluator::set_conditions(const GivenConditions& given) {
  const DefaultArithmetic arithmetic;
  const ResolvedConditions resolved = resolve_conditions(impl_->package.metadata, given);
  impl_->set_conditions(resolved.charge_spin, resolved.fparam);
  return resolved.applied;
}

void Evaluator::set_num_threads(int64_t n) {
  if (n < 0 || n > 4096) {
    throw Error("expected a number of threads from 1 to 4096, or 0 for the default, got " +
                std::to_string(n));
  }
  impl_->n_threads = static_cast<int>(n);
}
int64_t Evaluator::num_threads() const { return impl_->num_threads(); }

const std::vector<std::string>& Evaluator::elements() const { return impl_->model().elements; }
double Evaluator::cutoff() const { return impl_->model().rules.cutoff; }
double Evaluator::angle_cutoff() const { return impl_->model().rules.angle_cutoff; }
const std::string& Evaluator::dtype() const { return impl_->dtype_name; }
const std::string& Evaluator::device() const { return impl_->device_name; }
const std::string& Evaluator::precision() const { return impl_->precision_name; }
int64_t Evaluator::n_layers() const { return static_cast<int64_t>(impl_->model().layers.size()); }
const std::string& Evaluator::backend() const { return impl_->backend_name; }
const std::string& Evaluator::backend_reason() const { return impl_->backend_reason; }
bool Evaluator::survives_fork() const { return impl_->backend->survives_fork(); }
int64_t Evaluator::buffer_bytes() const { return impl_->backend->bytes(); }
int64_t Evaluator::estimate_bytes(int64_t n_node, int64_t n_edge, int64_t n_angle, bool least) const {
  const Backend& backend = *impl_->backend;
  return least ? backend.least_bytes(n_node, n_edge, n_angle)
               : backend.estimate_bytes(n_node, n_edge, n_angle);
}
const std::string& Evaluator::metadata() const { return impl_->package.metadata; }
const Facts& Evaluator::facts() const { return impl_->package.facts; }
std::vector<std::string> Evaluator::model_warnings() const { return impl_->model_warnings(); }
std::vector<std::string> Evaluator::structure_warnings(int64_t max_neighbors,
                                                       int64_t max_angle_neighbors) const {
  return impl_->structure_warnings(max_neighbors, max_angle_neighbors);
}
std::string Evaluator::record(const std::string& name) const { return impl_->package.file->record(name); }
int64_t Evaluator::n_packed_groups() const { return impl_->backend->n_packed_groups(); }
void Evaluator::release_weights() { impl_->release_weights(); }

}  // namespace moecalc
