// What computes: one interface for CPU kernels, CUDA kernels, the plain backend and TorchScript.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "core/threads.h"
#include "moecalc/evaluator.h"
#include "package/architecture.h"
#include "package/conditions.h"

namespace moecalc {

class MOECALC_API Backend {
 public:
  virtual ~Backend();

  /// Tables of the types, and conditions of the structures, from now on: always before the first list, and
  /// before a list whenever they changed.
  virtual void set_tables(const TypeTables& tables) = 0;
  /// `list` was checked, and has edge_from and edge_to.
  virtual void set_list(const NeighborList& list) = 0;
  /// Of the list that was set, which has owned atoms. Positions and cells were checked. Results in engine
  /// order; the evaluator checks that they are finite.
  virtual Evaluation evaluate(const Array& positions, const Array& cells, const Request& request,
                              GhostExchange* exchange) = 0;

  /// "fused avx512", "cuda fp32", "plain", "torchscript".
  virtual std::string name() const = 0;
  /// Whether the kernels of the device do the work: nothing to warn of.
  virtual bool is_fast() const { return true; }
  /// Whether a forked process can go on with it.
  virtual bool survives_fork() const { return true; }
  /// Bytes of buffers and weights that are kept between calls; those that a system would need, with all
  /// layers kept for the backward and with as few as possible.
  virtual int64_t bytes() const = 0;
  virtual int64_t estimate_bytes(int64_t /*n_node*/, int64_t /*n_edge*/, int64_t /*n_angle*/) const {
    return 0;
  }
  virtual int64_t least_bytes(int64_t /*n_node*/, int64_t /*n_edge*/, int64_t /*n_angle*/) const { return 0; }
  /// Routing groups whose weights are laid out, the bytes of these, and giving them back: a list must be set
  /// again then.
  virtual int64_t n_packed_groups() const { return 0; }
  virtual int64_t weight_bytes() const { return 0; }
  virtual void release_weights() {}
};

/// What backends are made of. `package` and `threads` outlive them; the number of threads may change between
/// evaluations.
struct BackendInputs {
  const LoadedPackage& package;
  const EvaluatorOptions& options;
  Dtype dtype;  // of the network
  ThreadPool& threads;
};

/// Null, with a `reason` that completes "the kernels do not cover ...", where an option of the package is not
/// covered. Throws Error.
std::unique_ptr<Backend> make_fused_backend(const BackendInputs& inputs, std::string& reason);
std::unique_ptr<Backend> make_cuda_backend(const BackendInputs& inputs, std::string& reason);
/// Covers every package.
std::unique_ptr<Backend> make_plain_backend(const BackendInputs& inputs);
/// Loads libmoecalc_torch.so. Throws Error, which says how to build it, if it is missing or does not fit.
std::unique_ptr<Backend> make_torchscript_backend(const BackendInputs& inputs);

/// Results full of zeros.
MOECALC_API Evaluation empty_result(int64_t n_node, int64_t n_local, int64_t n_systems,
                                    const Request& request);

/// The same for a graph, with its counts.
MOECALC_API Evaluation empty_result(const PreparedGraph& graph, const Request& request);

/// `energies` (n_local,) float64 in model order -> energies of atoms and structures, in engine order.
MOECALC_API void put_energies(const PreparedGraph& graph, const Array& energies, Evaluation& result);

/// g = dE/d(edge_vec), (n_edge * 3) of a graph: f_i += g, f_j -= g, virial -= edge_vec (x) g.
MOECALC_API void scatter_gradients(const PreparedGraph& graph, const double* gradient, const Request& request,
                                   Evaluation& result);

/// Row order between the engine's atoms and the graph's, and the exchange of ghosts in between.
/// `rows` (n_local, width) in model order -> (n_node, width): ghosts get the features of their owners. As it
/// is without `exchange`.
MOECALC_API Array with_ghosts(const PreparedGraph& graph, const Array& rows, GhostExchange* exchange);
/// Gradient of (n_node, width) rows -> (n_local, width) of the owned ones, with what other ranks' ghosts
/// contribute.
MOECALC_API Array without_ghosts(const PreparedGraph& graph, const Array& gradient, GhostExchange* exchange);

/// Compositions (n_systems, n_types) float64, summed over ranks: router input where groups are structures.
MOECALC_API Array composition_of(const PreparedGraph& graph, int64_t n_types, GhostExchange* exchange);
/// Router input of every group of the graph, (G, n_dim) float64.
MOECALC_API Array features_of(const PreparedGraph& graph, const Architecture& model, const TypeTables& tables,
                              GhostExchange* exchange);

/// Where the library `file` (libmoecalc_cuda.so, ...) has to be: beside this one.
std::string place_of_library(const std::string& file);
/// That library, opened once. Null, with `reason`, if it is
/// not there or does not load.
void* open_library(const std::string& file, std::string& reason);

}  // namespace moecalc
