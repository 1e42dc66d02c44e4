// The boundary between engines and models: an engine says `set_list` when its list of neighbors changed and
// `evaluate(positions)` every step; energies, forces and virials come back in its own order of atoms. Nothing
// below knows which engine it serves, nothing above which backend computes.
//
// Units: eV and Angstrom. Signs: force = -dE/dx, virial = -dE/d(strain) = -stress * volume.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "moecalc/array.h"
#include "moecalc/error.h"
#include "moecalc/options.h"
#include "moecalc/version.h"

namespace moecalc {

/// Two atoms closer than this (Angstrom) are an error where a run starts: no training data is there, and the
/// model's answer means nothing. MIN_DISTANCE of moecalc/keys.py.
inline constexpr double min_distance = 0.5;

/// Atoms and their neighbors, valid for a while: only positions and cells change from one evaluation to the
/// next. Arrays of exactly these types.
struct NeighborList {
  Array types;         // (n_node,) int64: index into Evaluator::elements(); owned atoms first, then ghosts
  Array edge_index;    // (2, n_edge) int64, any order: row 0 centre < n_local, row 1 neighbor < n_node
  Array edge_from;     // (n_edge,) int64: row of the centre in `positions`; undefined: the centre
  Array edge_to;       // (n_edge,) int64: row of the neighbor, or of its image; undefined: the neighbor
  Array edge_shift;    // (n_edge, 3) int64 cells between them: vec = x[to] - x[from] + shift @ cell;
                       // undefined: none
  Array system_index;  // (n_local,) int64 in [0, n_systems): structure of a batch that an owned atom is of
  int64_t n_systems = 1;
};

/// How an engine with several ranks exchanges data of ghost atoms. All calls come from the thread that called
/// Evaluator::evaluate, in the same number and order on every rank, also on a rank that owns no atoms.
class MOECALC_API GhostExchange {
 public:
  virtual ~GhostExchange();
  /// Fill rows >= n_local of `features` with the owners' rows: (n_node, width) of the network's dtype, in
  /// engine order.
  virtual void forward(Array features) = 0;
  /// Add the ghost rows of `gradients` to the owners' rows. Same layout.
  virtual void reverse(Array gradients) = 0;
  /// Sum `values` (float64) over all ranks in place.
  virtual void sum(Array values) = 0;

  /// Which rows travel, for a backend whose features are not in the memory of the host: it brings no others,
  /// and calls exchange() in place of forward() and reverse().
  struct Plan {
    std::vector<int64_t> sent;  // rows < n_local by destination: once for every rank that has them as ghosts
    std::vector<int64_t> received;  // rows >= n_local by source, each once
    bool of_device = false;         // exchange() takes memory of the GPU
    int64_t version = 0;            // another one with every change
  };
  /// Null: there is none. Valid until the next list.
  virtual const Plan* plan() const { return nullptr; }
  /// Rows of `row_bytes` bytes in the orders of the plan: from `sent` to where they go, and from there into
  /// `received`; if `back`, from `received` to where they came from, and from there into `sent`.
  virtual void exchange(void* sent, void* received, int64_t row_bytes, bool back);
};

/// What to compute besides energies. Nothing is differentiated if all are false.
struct Request {
  bool forces = true;
  bool virial = true;
  bool atom_virial = false;

  bool gradients() const { return forces || virial || atom_virial; }
  bool operator==(const Request&) const = default;
};

/// Charge (e), multiplicity 2S+1 and frame parameters, as far as a user gave them.
struct GivenConditions {
  std::optional<double> charge;
  std::optional<double> spin;
  std::optional<std::vector<double>> fparam;
};

/// What a model was given: texts like "charge 0, spin 1", empty where there is nothing to tell.
struct AppliedConditions {
  std::string values;    // all
  std::string defaults;  // those that are the package's defaults
};

/// Seconds by part of an evaluation.
using Timings = std::vector<std::pair<std::string, double>>;

/// Results in engine order, float64; arrays that were not requested are undefined.
struct Evaluation {
  Array energy;    // (n_systems,) eV, sum over the atoms of this rank
  Array energies;  // (n_local,) eV
  /// (n_node, 3) eV/Angstrom. Ghost rows hold what this rank contributes to atoms of other ranks: the engine
  /// must add them to their owners.
  Array forces;
  Array virial;        // (n_systems, 3, 3) eV, = -dE/d(strain), contribution of this rank
  Array atom_virial;   // (n_node, 3, 3) eV, centroid form: an edge's share is on its neighbor's row
  int64_t n_edge = 0;  // edges within the cutoff
  int64_t n_angle = 0;
  int64_t max_neighbors = 0;        // of one atom, within the cutoff
  int64_t max_angle_neighbors = 0;  // of one atom, within the angle cutoff
  /// Wall time of the parts; with the fused kernels also those of the layers (mean over threads).
  Timings timings;
};

/// What a package says of its model that engines tell their users.
struct Facts {
  std::string name;
  std::string citation;
  std::vector<std::string> trained_elements;
  int64_t node_dim = 0;
  // neighbors of one atom in training, at most: within the cutoff and within the angle cutoff; 0: unknown
  int64_t edge_limit = 0;
  int64_t angle_limit = 0;
  std::string fixed;  // charge, spin and frame parameters that are folded: "charge 0, spin 1"
};

/// A model loaded from a package file. Use one Evaluator per thread. It has threads of its own and leaves the
/// settings of the process as they are.
class MOECALC_API Evaluator {
 public:
  /// Throws Error.
  Evaluator(const std::string& path, const EvaluatorOptions& options);
  ~Evaluator();
  Evaluator(Evaluator&&) noexcept;
  Evaluator& operator=(Evaluator&&) noexcept;

  /// The list of the evaluations to come, shared: its arrays must not change. Throws Error if invalid.
  void set_list(const NeighborList& list);
  /// Evaluates the list for positions (n_position, 3) float64 and cells (n_systems, 3, 3) float64 with a
  /// vector per row, which may be undefined if the list has no shifts. Throws Error for invalid positions, a
  /// model that fails or a result that is not finite (NotFiniteError, OverlapError), and OutOfMemoryError.
  /// `exchange` is needed as soon as there are ghosts and more than one layer; if it is given, it is used
  /// even on ranks without ghosts, because other ranks may wait for this one.
  Evaluation evaluate(const Array& positions, const Array& cells, const Request& request = {},
                      GhostExchange* exchange = nullptr);

  /// Evaluates stored reference frames, the fewest that hold all of `elements` (none given: of the package),
  /// and throws Error unless energies, forces and virial are the stored ones: a package whose weights, cutoff
  /// or elements were changed, or a device, driver or library that computes something else. The list is lost.
  void check_reference(const std::vector<std::string>& elements = {});

  /// Charge and multiplicity (K, 2) int64 and frame parameters (K, n_fparam) float64, undefined where the
  /// model takes none, of the structures to come: K is their number, or 1 for any number. A model that takes
  /// conditions (docs/developer/architecture.md) refuses to evaluate before. Throws Error.
  void set_conditions(const Array& charge_spin, const Array& fparam);
  /// The same for all structures to come, from what a user gave: what is missing has the package's default.
  /// Throws Error for values that the model does not take, or that are missing or contradict each other.
  AppliedConditions set_conditions(const GivenConditions& given);

  /// CPU threads of the evaluations to come, 1 to 4096; 0: the default, OMP_NUM_THREADS or the cores. The
  /// results do not depend on it. Throws Error.
  void set_num_threads(int64_t n);
  int64_t num_threads() const;

  const std::vector<std::string>& elements() const;  // symbols; the position is the type
  double cutoff() const;                             // Angstrom
  double angle_cutoff() const;                       // Angstrom; 0 = the model has no angles
  const std::string& dtype() const;                  // "float32" or "float64"
  const std::string& device() const;                 // "cpu" or "cuda:N"
  const std::string& precision() const;              // of products on a GPU: "fp32", "tf32", ...
  int64_t n_layers() const;
  /// What runs the layers: "fused avx512" (or avx2, generic), "cuda fp32" (or another precision, float64),
  /// "plain" or "torchscript" where the kernels do not apply, for the reason that backend_reason() gives.
  const std::string& backend() const;
  const std::string& backend_reason() const;
  /// Whether a forked process can go on with this evaluator.
  bool survives_fork() const;
  /// Bytes of the buffers and weights that the backend keeps between calls, on the device where it runs.
  int64_t buffer_bytes() const;
  /// Bytes that the CUDA kernels would need for a system of this size; 0 where others run. `least`: with
  /// which it still runs, slower, because layers are computed again for the gradients.
  int64_t estimate_bytes(int64_t n_node, int64_t n_edge, int64_t n_angle, bool least = false) const;
  const std::string& metadata() const;  // text of the package's metadata.json
  const Facts& facts() const;
  /// Sentences that an engine shows its user once, after a beginning of its own. Empty: nothing to tell.
  /// Of the model: that something slower than the kernels of the device evaluates it.
  std::vector<std::string> model_warnings() const;
  /// Of a structure: that it is denser than any in training, by the cutoff and by the angle cutoff. The
  /// numbers are those of Evaluation, the largest of all ranks.
  std::vector<std::string> structure_warnings(int64_t max_neighbors, int64_t max_angle_neighbors) const;
  /// Content of a record of the package, for example "extra/reference.json". Throws Error if there is none.
  std::string record(const std::string& name) const;
  /// Routing groups (elements, or structures of a batch) whose weights are laid out for the kernels: those
  /// that have had atoms, of which absent ones are dropped when memory is short. 0 where nothing is laid out.
  int64_t n_packed_groups() const;
  /// Gives back the weights of all groups. They are laid out again when they have atoms.
  void release_weights();

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

/// Counts changes of this interface that leave the sizes of all objects as they are.
inline constexpr int interface_revision = 4;

/// What a program was compiled with that hands these objects over: version and revision of the interface, and
/// the sizes of what passes. `version`: MOECALC_VERSION of the program.
inline std::string engine_build_id(const char* version) {
  std::string id = version + ("-" + std::to_string(interface_revision));
  for (const size_t size :
       {sizeof(Array), sizeof(NeighborList), sizeof(Request), sizeof(Evaluation), sizeof(GivenConditions),
        sizeof(AppliedConditions), sizeof(Facts), sizeof(EvaluatorOptions), sizeof(Evaluator)}) {
    id += '.';
    id += std::to_string(size);
  }
  return id;
}
/// The same of the library: a program with another one must not use it.
MOECALC_API const char* engine_build();

}  // namespace moecalc
