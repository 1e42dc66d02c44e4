#include "backends/backend.h"

#include <dlfcn.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <mutex>

#include "moecalc/text.h"
#include "package/routing.h"

namespace moecalc {

Backend::~Backend() = default;

Evaluation empty_result(int64_t n_node, int64_t n_local, int64_t n_systems, const Request& request) {
  Evaluation result;
  result.energy = Array::zeros({n_systems}, Dtype::float64);
  result.energies = Array::zeros({n_local}, Dtype::float64);
  if (request.forces) result.forces = Array::zeros({n_node, 3}, Dtype::float64);
  if (request.virial) result.virial = Array::zeros({n_systems, 3, 3}, Dtype::float64);
  if (request.atom_virial) result.atom_virial = Array::zeros({n_node, 3, 3}, Dtype::float64);
  return result;
}

Evaluation empty_result(const PreparedGraph& graph, const Request& request) {
  Evaluation result = empty_result(graph.n_node, graph.n_local, graph.n_systems, request);
  result.n_edge = graph.n_edge;
  result.n_angle = graph.n_angle;
  result.max_neighbors = graph.max_neighbors;
  result.max_angle_neighbors = graph.max_angle_neighbors;
  return result;
}

void put_energies(const PreparedGraph& graph, const Array& energies, Evaluation& result) {
  result.energies = energies.select(graph.model_row);
  const auto* of_atom = result.energies.data<double>();
  auto* of_system = result.energy.data<double>();
  for (size_t i = 0; i < graph.model_row.size(); ++i) {
    of_system[graph.system[static_cast<size_t>(graph.model_row[i])]] += of_atom[i];
  }
}

void scatter_gradients(const PreparedGraph& graph, const double* gradient, const Request& request,
                       Evaluation& result) {
  double* forces = request.forces ? result.forces.data<double>() : nullptr;
  double* virial = request.virial ? result.virial.data<double>() : nullptr;
  double* atom_virial = request.atom_virial ? result.atom_virial.data<double>() : nullptr;
  for (int64_t edge = 0; edge < graph.n_edge; ++edge) {
    const auto at = static_cast<size_t>(edge);
    const int64_t centre = graph.centre[at];
    const int64_t i = graph.engine_row[static_cast<size_t>(centre)];
    const int64_t j = graph.engine_row[static_cast<size_t>(graph.neighbor[at])];
    const int64_t system = graph.system[static_cast<size_t>(centre)];
    const double* d_vector = gradient + 3 * edge;
    const double* vector = graph.edge_vec.data() + 3 * edge;
    if (forces != nullptr) {
      for (int c = 0; c < 3; ++c) {
        forces[3 * i + c] += d_vector[c];
        forces[3 * j + c] -= d_vector[c];
      }
    }
    for (int row = 0; row < 3; ++row) {
      for (int column = 0; column < 3; ++column) {
        const double share = vector[row] * d_vector[column];
        if (virial != nullptr) virial[9 * system + 3 * row + column] -= share;
        if (atom_virial != nullptr) atom_virial[9 * j + 3 * row + column] -= share;
      }
    }
  }
}

namespace {

/// Copies row `from[k]` to row `to[k]`, k < count, where one of them is null for k itself.
void copy_rows(const Array& source, const int64_t* from, const Array& target, const int64_t* to,
               int64_t count) {
  if (count == 0) return;
  const size_t row = source.bytes() / static_cast<size_t>(source.size(0));
  const auto* in = static_cast<const char*>(source.bytes_data());
  auto* out = static_cast<char*>(target.bytes_data());
  for (int64_t k = 0; k < count; ++k) {
    const int64_t source_row = from == nullptr ? k : from[k];
    const int64_t target_row = to == nullptr ? k : to[k];
    std::memcpy(out + static_cast<size_t>(target_row) * row, in + static_cast<size_t>(source_row) * row, row);
  }
}

}  // namespace

Array with_ghosts(const PreparedGraph& graph, const Array& rows, GhostExchange* exchange) {
  if (exchange == nullptr) return rows;
  const int64_t width = rows.size(1);
  const Array buffer = Array::zeros({graph.n_node, width}, rows.dtype());
  copy_rows(rows, nullptr, buffer, graph.engine_row.data(), graph.n_local);
  exchange->forward(buffer);
  const int64_t n_ghost = graph.n_node - graph.n_local;
  if (n_ghost == 0) return rows;
  const Array all = Array::empty({graph.n_node, width}, rows.dtype());
  const Array ghosts = buffer.rows(graph.n_local, n_ghost);
  copy_rows(rows, nullptr, all, nullptr, graph.n_local);
  copy_rows(ghosts, nullptr, all.rows(graph.n_local, n_ghost), nullptr, n_ghost);
  return all;
}

Array without_ghosts(const PreparedGraph& graph, const Array& gradient, GhostExchange* exchange) {
  if (exchange == nullptr) return gradient;
  const Array buffer = Array::zeros(gradient.shape(), gradient.dtype());
  copy_rows(gradient, nullptr, buffer, graph.engine_row.data(), graph.n_node);
  exchange->reverse(buffer);
  const Array owned = Array::empty({graph.n_local, gradient.size(1)}, gradient.dtype());
  copy_rows(buffer, graph.engine_row.data(), owned, nullptr, graph.n_local);
  return owned;
}

Array composition_of(const PreparedGraph& graph, int64_t n_types, GhostExchange* exchange) {
  const Array composition = Array::of(graph.composition, {graph.n_systems, n_types});
  if (exchange != nullptr) exchange->sum(composition);
  auto* count = composition.data<double>();
  for (int64_t system = 0; system < graph.n_systems; ++system, count += n_types) {
    double total = 0.0;
    for (int64_t t = 0; t < n_types; ++t) total += count[t];
    // a structure without atoms has no composition; its rows are never used
    for (int64_t t = 0; t < n_types; ++t) count[t] /= std::max(1.0, total);
  }
  return composition;
}

Array features_of(const PreparedGraph& graph, const Architecture& model, const TypeTables& tables,
                  GhostExchange* exchange) {
  if (!tables.rules.group_by_system) return tables.features;
  Array shift;
  if (model.conditions.routed) {
    std::vector<int64_t> condition;
    for (int64_t system = 0; system < graph.n_systems; ++system) {
      condition.push_back(tables.rules.condition(system));
    }
    shift = tables.shift.select(condition);
  }
  return group_features(model.embedding, composition_of(graph, model.n_types(), exchange), shift);
}

std::string place_of_library(const std::string& file) {
  Dl_info info;
  const auto* in_this_library = reinterpret_cast<const void*>(&place_of_library);
  if (::dladdr(in_this_library, &info) == 0 || info.dli_fname == nullptr) return file;
  const std::string here = info.dli_fname;
  const size_t slash = here.rfind('/');
  return slash == std::string::npos ? file : here.substr(0, slash + 1) + file;
}

void* open_library(const std::string& file, std::string& reason) {
  static std::mutex mutex;
  static std::map<std::string, void*> opened;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = opened.find(file);
  if (found != opened.end()) return found->second;
  const std::string path = place_of_library(file);
  void* handle = ::dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (handle == nullptr) {  // tried again the next time: what it needs may have been loaded by then
    const char* message = ::dlerror();
    reason = ::access(path.c_str(), F_OK) != 0 ? file + " is not there"
                                               : printable(message == nullptr ? file : message, 300);
    return nullptr;
  }
  opened.emplace(file, handle);
  return handle;
}

}  // namespace moecalc
