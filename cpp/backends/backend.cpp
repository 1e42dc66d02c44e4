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

void scatter_gradients(const PreparedGraph& graph, const double* gradient, const Request& request,
                       Evaluation& result) {
  double* forces = request.forces ? result.forces.data<double>() : nullptr;
  double* virial = request.virial ? result.virial.data<double>() : nullptr;
  double* atom_virial = request.atom_virial ? result.atom_virial.data<double>() : nullptr;
  for (int64_t e = 0; e < graph.n_edge; ++e) {
    const auto at = static_cast<size_t>(e);
    const int64_t centre = graph.centre[at];
    const int64_t i = graph.engine_row[static_cast<size_t>(centre)];
    const int64_t j = graph.engine_row[static_cast<size_t>(graph.neighbor[at])];
    const int64_t system = graph.system[static_cast<size_t>(centre)];
    const double* g = gradient + 3 * e;
    const double* vec = graph.edge_vec.data() + 3 * e;
    if (forces != nullptr) {
      for (int a = 0; a < 3; ++a) {
        forces[3 * i + a] += g[a];
        forces[3 * j + a] -= g[a];
      }
    }
    for (int a = 0; a < 3; ++a) {
      for (int b = 0; b < 3; ++b) {
        const double share = vec[a] * g[b];
        if (virial != nullptr) virial[9 * system + 3 * a + b] -= share;
        if (atom_virial != nullptr) atom_virial[9 * j + 3 * a + b] -= share;
      }
    }
  }
}

namespace {

/// Copies row `from[k]` to row `to[k]`, k < n, where one of them is null for k itself.
void copy_rows(const Array& source, const int64_t* from, const Array& target, const int64_t* to, int64_t n) {
  if (n == 0) return;
  const size_t row = source.bytes() / static_cast<size_t>(source.size(0));
  const auto* in = static_cast<const char*>(source.bytes_data());
  auto* out = static_cast<char*>(target.bytes_data());
  for (int64_t k = 0; k < n; ++k) {
    std::memcpy(out + static_cast<size_t>(to == nullptr ? k : to[k]) * row,
                in + static_cast<size_t>(from == nullptr ? k : from[k]) * row, row);
  }
}

}  // namespace

Array with_ghosts(const PreparedGraph& graph, const Array& v, GhostExchange* exchange) {
  if (exchange == nullptr) return v;
  const Array buffer = Array::zeros({graph.n_node, v.size(1)}, v.dtype());
  copy_rows(v, nullptr, buffer, graph.engine_row.data(), graph.n_local);
  exchange->forward(buffer);
  const int64_t n_ghost = graph.n_node - graph.n_local;
  if (n_ghost == 0) return v;
  const Array all = Array::empty({graph.n_node, v.size(1)}, v.dtype());
  copy_rows(v, nullptr, all, nullptr, graph.n_local);
  copy_rows(buffer.rows(graph.n_local, n_ghost), nullptr, all.rows(graph.n_local, n_ghost), nullptr, n_ghost);
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
  for (int64_t s = 0; s < graph.n_systems; ++s, count += n_types) {
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
    for (int64_t s = 0; s < graph.n_systems; ++s) condition.push_back(tables.rules.condition(s));
    shift = tables.shift.select(condition);
  }
  return group_features(model.embedding, composition_of(graph, model.n_types(), exchange), shift);
}

void* open_library(const std::string& file, std::string& reason) {
  static std::mutex mutex;
  static std::map<std::string, void*> opened;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = opened.find(file);
  if (found != opened.end()) return found->second;
  std::string path;
  Dl_info info;
  if (::dladdr(reinterpret_cast<const void*>(&open_library), &info) != 0 && info.dli_fname != nullptr) {
    path = info.dli_fname;
    path.resize(path.rfind('/') == std::string::npos ? 0 : path.rfind('/') + 1);
  }
  path += file;
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
