// Python module `moecalc._C`: numpy in, numpy out.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <atomic>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

#include "backends/cpu/one_layer.h"
#include "moecalc/committee.h"
#include "moecalc/evaluator.h"
#include "moecalc/package_file.h"
#include "moecalc/version.h"
#include "python/arrays.h"

namespace py = pybind11;

void bind_training(py::module_& module);  // training_bindings.cpp

namespace {

using moecalc::Array;
using moecalc::Doubles;
using moecalc::integers;
using moecalc::to_numpy;
using moecalc::view;

/// A GhostExchange written in Python: its methods forward, reverse and sum change an array in place. It may
/// have plan() as well, which returns rows that are sent and received and whether memory of the device is
/// taken; exchange(sent, received, back) then gets arrays of bytes, (n, row_bytes).
class PythonExchange final : public moecalc::GhostExchange {
 public:
  explicit PythonExchange(py::object object) : object_(std::move(object)) {}

  void forward(Array features) override { call("forward", features); }
  void reverse(Array gradients) override { call("reverse", gradients); }
  void sum(Array values) override { call("sum", values); }
  const Plan* plan() const override {
    const py::gil_scoped_acquire gil;
    if (!py::hasattr(object_, "plan")) return nullptr;
    try {
      auto [sent, received, of_device] =
          object_.attr("plan")().cast<std::tuple<std::vector<int64_t>, std::vector<int64_t>, bool>>();
      static std::atomic<int64_t> version = 0;
      plan_ = {std::move(sent), std::move(received), of_device, ++version};
    } catch (const std::exception& error) {
      fail("plan", error);
    }
    return &plan_;
  }
  void exchange(void* sent, void* received, int64_t row_bytes, bool back) override {
    const py::gil_scoped_acquire gil;
    const auto rows = [this, row_bytes](void* data, const std::vector<int64_t>& of) {
      const py::capsule unowned(this, [](void*) {});
      return py::array_t<uint8_t>({static_cast<py::ssize_t>(of.size()), static_cast<py::ssize_t>(row_bytes)},
                                  static_cast<uint8_t*>(data), unowned);
    };
    try {
      object_.attr("exchange")(rows(sent, plan_.sent), rows(received, plan_.received), back);
    } catch (const py::error_already_set& error) {
      fail("exchange", error);
    }
  }

 private:
  void call(const char* method, const Array& array) {
    const py::gil_scoped_acquire gil;
    try {
      object_.attr(method)(to_numpy(array));
    } catch (const py::error_already_set& error) {
      fail(method, error);
    }
  }
  [[noreturn]] static void fail(const char* method, const std::exception& error) {
    const std::string message = error.what();
    throw moecalc::Error(std::string("the ghost exchange failed in `") + method +
                         "`: " + message.substr(0, message.find('\n')));
  }

  py::object object_;
  mutable Plan plan_;
};

py::dict to_dict(const moecalc::Evaluation& result) {
  py::dict out;
  out["energy"] = to_numpy(result.energy);
  out["energies"] = to_numpy(result.energies);
  if (result.forces.defined()) out["forces"] = to_numpy(result.forces);
  if (result.virial.defined()) out["virial"] = to_numpy(result.virial);
  if (result.atom_virial.defined()) out["atom_virial"] = to_numpy(result.atom_virial);
  py::dict timings;
  for (const auto& [part, seconds] : result.timings) timings[py::str(part)] = seconds;
  out["timings"] = timings;
  out["n_edge"] = result.n_edge;
  out["n_angle"] = result.n_angle;
  out["max_neighbors"] = result.max_neighbors;
  out["max_angle_neighbors"] = result.max_angle_neighbors;
  return out;
}

py::dict to_dict(const moecalc::Facts& facts) {
  py::dict out;
  out["name"] = facts.name;
  out["citation"] = facts.citation;
  out["trained_elements"] = facts.trained_elements;
  out["node_dim"] = facts.node_dim;
  out["edge_limit"] = facts.edge_limit;
  out["angle_limit"] = facts.angle_limit;
  out["fixed"] = facts.fixed;
  return out;
}

/// Of an evaluator or a committee. Arrays are copied, because it keeps the list longer than the caller its
/// arrays.
template <typename Engine>
void set_list(Engine& engine, const py::array& types, const py::array& edge_index,
              const py::object& edge_shift, const py::array& system_index, int64_t n_systems,
              const py::object& edge_from, const py::object& edge_to) {
  const auto copy = [](const py::array& array, const char* name) {
    return view(integers(array, name)).clone();
  };
  const auto optional = [&](const py::object& array, const char* name) {
    return array.is_none() ? Array() : copy(array.cast<py::array>(), name);
  };
  moecalc::NeighborList list;
  list.types = copy(types, "types");
  list.edge_index = copy(edge_index, "edge_index");
  list.edge_from = optional(edge_from, "edge_from");
  list.edge_to = optional(edge_to, "edge_to");
  list.edge_shift = optional(edge_shift, "edge_shift");
  list.system_index = copy(system_index, "system_index");
  list.n_systems = n_systems;
  const py::gil_scoped_release release;
  engine.set_list(list);
}

/// None where the model takes none.
void set_conditions(moecalc::Evaluator& evaluator, const py::object& charge_spin, const py::object& fparam) {
  Array pairs;
  Array numbers;
  if (!charge_spin.is_none()) {
    pairs = view(integers(charge_spin.cast<py::array>(), "charge_spin")).clone();
  }
  if (!fparam.is_none()) numbers = view(fparam.cast<Doubles>()).clone();
  const py::gil_scoped_release release;
  evaluator.set_conditions(pairs, numbers);
}

std::pair<std::string, std::string> give_conditions(moecalc::Evaluator& evaluator,
                                                    std::optional<double> charge, std::optional<double> spin,
                                                    std::optional<std::vector<double>> fparam) {
  const py::gil_scoped_release release;
  const auto applied = evaluator.set_conditions({charge, spin, std::move(fparam)});
  return {applied.values, applied.defaults};
}

py::dict evaluate(moecalc::Evaluator& evaluator, const Doubles& positions,
                  const std::optional<Doubles>& cells, bool forces, bool virial, bool atom_virial,
                  const py::object& exchange) {
  const Array atoms_at = view(positions);
  const Array cell_vectors = cells ? view(*cells) : Array();
  moecalc::Evaluation result;
  PythonExchange python_exchange(exchange);
  {
    // other Python threads may go on meanwhile
    const py::gil_scoped_release release;
    result = evaluator.evaluate(atoms_at, cell_vectors, {forces, virial, atom_virial},
                                exchange.is_none() ? nullptr : &python_exchange);
  }
  return to_dict(result);
}

std::unique_ptr<moecalc::Evaluator> open_evaluator(const std::string& path, const std::string& device,
                                                   const std::string& dtype, const std::string& precision,
                                                   const std::string& backend) {
  const py::gil_scoped_release release;
  return std::make_unique<moecalc::Evaluator>(
      path, moecalc::EvaluatorOptions::parse(device, dtype, precision, backend));
}

std::vector<py::array> run_layer(moecalc::LayerRunner& runner, const py::array& types_in,
                                 const py::array& edge_index_in, const Doubles& edge_vec, int64_t layer,
                                 const std::vector<Doubles>& inputs, const std::vector<Doubles>& gradients) {
  const auto types = integers(types_in, "types");
  const auto edge_index = integers(edge_index_in, "edge_index");
  const auto views = [](const std::vector<Doubles>& arrays) {
    std::vector<Array> out;
    for (const Doubles& array : arrays) out.push_back(view(array));
    return out;
  };
  std::vector<py::array> out;
  for (const Array& array :
       runner.run({view(types), view(edge_index), view(edge_vec)}, layer, views(inputs), views(gradients))) {
    // outputs that a layer does not change share the caller's memory
    out.push_back(to_numpy(array.clone()));
  }
  return out;
}

/// An exception of Python whose instances have the attributes of the C++ one.
py::handle new_error(py::module_& module, const char* name, const py::handle& base) {
  const std::string full = module.attr("__name__").cast<std::string>() + "." + name;
  const auto type = py::reinterpret_steal<py::object>(PyErr_NewException(full.c_str(), base.ptr(), nullptr));
  module.attr(name) = type;
  return type.ptr();  // the module keeps it
}

void bind_errors(py::module_& module) {
  const py::handle error = py::register_exception<moecalc::Error>(module, "Error", PyExc_RuntimeError);
  py::register_exception<moecalc::OutOfMemoryError>(module, "OutOfMemoryError", error);
  static py::handle not_finite;
  static py::handle overlap;
  not_finite = new_error(module, "NotFiniteError", error);
  overlap = new_error(module, "OverlapError", error);
  py::register_exception_translator([](std::exception_ptr pointer) {
    if (!pointer) return;
    try {
      std::rethrow_exception(pointer);
    } catch (const moecalc::NotFiniteError& exception) {
      const py::object instance = not_finite(exception.what());
      instance.attr("atom") = exception.atom;
      PyErr_SetObject(not_finite.ptr(), instance.ptr());
    } catch (const moecalc::OverlapError& exception) {
      const py::object instance = overlap(exception.what());
      instance.attr("first") = exception.first;
      instance.attr("second") = exception.second;
      PyErr_SetObject(overlap.ptr(), instance.ptr());
    }
  });
}

void bind_package_files(py::module_& module) {
  module.def("build_info", &moecalc::build_info, "What the library was built with, as JSON text.");
  module.def("cuda_device_count", &moecalc::cuda_device_count,
             "GPUs that this process can use; 0 where there is no CUDA library or no driver.");
  module.def("check_archive", &moecalc::check_archive, py::arg("path"),
             py::call_guard<py::gil_scoped_release>(),
             "Raise Error unless `path` is an intact package file of a known format.");
  module.def(
      "check_package", [](const std::string& path) { moecalc::check_package(moecalc::PackageFile(path)); },
      py::arg("path"), py::call_guard<py::gil_scoped_release>(),
      "Raise Error unless `path` is an intact package that torch may load: its code can do nothing but "
      "compute.");
  module.def(
      "check_package",
      [](const std::string& path, const py::bytes& content) {
        const auto bytes = static_cast<std::string_view>(content);
        const py::gil_scoped_release others_run;
        moecalc::check_package(moecalc::PackageFile(path, bytes));
      },
      py::arg("path"), py::arg("content"), "The same for what was read from `path`.");
  module.def(
      "words_of_code",
      [](const std::string& path) { return moecalc::words_of_code(moecalc::PackageFile(path)); },
      py::arg("path"), "Words of a package's code that check_package looks at, sorted.");
  module.def("allowed_words", &moecalc::allowed_words, "Words that check_package lets through, sorted.");
  module.def(
      "read_record",
      [](const std::string& path, const std::string& name) {
        return py::bytes(moecalc::read_record(path, name));
      },
      py::arg("path"), py::arg("name"),
      "Bytes of one record of a package file, for example 'extra/metadata.json'.");
}

using EvaluatorClass = py::class_<moecalc::Evaluator>;

/// What the opened model is.
void bind_properties(EvaluatorClass& evaluator) {
  using moecalc::Evaluator;
  evaluator.def_property_readonly("elements", &Evaluator::elements)
      .def_property_readonly("cutoff", &Evaluator::cutoff)
      .def_property_readonly("angle_cutoff", &Evaluator::angle_cutoff)
      .def_property_readonly("dtype", &Evaluator::dtype)
      .def_property_readonly("device", &Evaluator::device)
      .def_property_readonly("precision", &Evaluator::precision)
      .def_property("num_threads", &Evaluator::num_threads, &Evaluator::set_num_threads,
                    "CPU threads of the evaluations to come; 0: OMP_NUM_THREADS or the cores.")
      .def_property_readonly("n_layers", &Evaluator::n_layers)
      .def_property_readonly("backend", &Evaluator::backend)
      .def_property_readonly("backend_reason", &Evaluator::backend_reason)
      .def_property_readonly("survives_fork", &Evaluator::survives_fork,
                             "Whether a forked process can go on with this evaluator.")
      .def_property_readonly("buffer_bytes", &Evaluator::buffer_bytes)
      .def_property_readonly("metadata", &Evaluator::metadata)
      .def_property_readonly(
          "facts", [](const Evaluator& evaluator) { return to_dict(evaluator.facts()); },
          "What the package says of its model that engines tell their users: see Facts in evaluator.h.")
      .def_property_readonly("n_packed_groups", &Evaluator::n_packed_groups);
}

/// What it tells, checks and gives back.
void bind_services(EvaluatorClass& evaluator) {
  using moecalc::Evaluator;
  evaluator
      .def("model_warnings", &Evaluator::model_warnings,
           "Sentences for a user of the model: that something slower than the kernels evaluates it.")
      .def("structure_warnings", &Evaluator::structure_warnings, py::arg("max_neighbors"),
           py::arg("max_angle_neighbors"),
           "Sentences for a user of a structure with these numbers: that it is denser than any in training.")
      .def("release_weights", &Evaluator::release_weights,
           "Give back the weights that are laid out; those of atoms are laid out again.")
      .def(
          "record",
          [](const Evaluator& evaluator, const std::string& name) {
            return py::bytes(evaluator.record(name));
          },
          py::arg("name"), "Bytes of one record of the package, for example 'extra/reference.json'.")
      .def("estimate_bytes", &Evaluator::estimate_bytes, py::arg("n_node"), py::arg("n_edge"),
           py::arg("n_angle"), py::arg("least") = false,
           "Bytes that the CUDA kernels would need for a system of this size; 0 where others run. `least`: "
           "with which it still runs, slower, because layers are computed again for the gradients.")
      .def("check_reference", &Evaluator::check_reference, py::arg("elements") = std::vector<std::string>{},
           py::call_guard<py::gil_scoped_release>(),
           "Raise Error unless stored reference frames that hold these elements (default: all) come out as "
           "stored. The list is lost.");
}

/// Evaluations.
void bind_evaluations(EvaluatorClass& evaluator) {
  evaluator
      .def("set_conditions", &set_conditions, py::arg("charge_spin") = py::none(),
           py::arg("fparam") = py::none(),
           "Charge and multiplicity (K, 2) and frame parameters (K, n) of the structures to come; K is their "
           "number, or 1 for any number. None where the model takes none.")
      .def("give_conditions", &give_conditions, py::arg("charge") = py::none(), py::arg("spin") = py::none(),
           py::arg("fparam") = py::none(),
           "The same for all structures to come, from what a user gave, as engines without Python have it: "
           "what is missing has the package's default. Returns texts of all values and of the defaults.")
      .def("set_list", &set_list<moecalc::Evaluator>, py::arg("types"), py::arg("edge_index"),
           py::arg("edge_shift").none(true), py::arg("system_index"), py::arg("n_systems") = 1,
           py::arg("edge_from") = py::none(), py::arg("edge_to") = py::none(),
           "The list of the evaluations to come. edge_index (2, n_edge): centres and neighbors; edge_shift "
           "(n_edge, 3) counts cells, None: no images; edge_from and edge_to (n_edge,): rows of positions, "
           "None: those of the nodes.")
      .def("evaluate", &evaluate, py::arg("positions"), py::arg("cells") = py::none(), py::kw_only(),
           py::arg("forces") = true, py::arg("virial") = true, py::arg("atom_virial") = false,
           py::arg("exchange") = py::none(),
           "Energies (eV), forces (eV/Angstrom) and virials (eV) of the list that was set, as a dict of "
           "float64 arrays in the order of its atoms, for positions (n_position, 3) and cells (n_systems, 3, "
           "3).");
}

void bind_evaluator(py::module_& module) {
  module.attr("MIN_DISTANCE") = moecalc::min_distance;
  EvaluatorClass evaluator(module, "Evaluator", "A model loaded from a package file. Use one per thread.");
  evaluator.def(
      py::init(&open_evaluator), py::arg("path"), py::arg("device") = "cpu", py::arg("dtype") = "",
      py::arg("precision") = "fp32", py::arg("backend") = "",
      "device: 'cpu', 'cuda', 'cuda:N' or 'auto'; dtype: 'float32', 'float64' or '' (the package's own); "
      "precision: 'fp32', 'fp32-ffma', 'bf16x3', 'tf32' or 'fp16' (products on a GPU); backend: 'fused', "
      "'plain', "
      "'torchscript', 'cuda-emulation' or '' (the kernels of the device where they cover the model).");
  bind_properties(evaluator);
  bind_services(evaluator);
  bind_evaluations(evaluator);
}

/// Keeps the Python objects of its members, whatever becomes of the list that they came in.
class HeldCommittee : public moecalc::Committee {
 public:
  explicit HeldCommittee(const std::vector<moecalc::Evaluator*>& members) : Committee(members) {
    for (moecalc::Evaluator* const member : members) {
      kept_.push_back(py::cast(member, py::return_value_policy::reference));
    }
  }

 private:
  std::vector<py::object> kept_;
};

std::vector<py::dict> evaluate_members(HeldCommittee& committee, int64_t n_members, const Doubles& positions,
                                       const std::optional<Doubles>& cells) {
  const Array atoms_at = view(positions);
  const Array cell_vectors = cells ? view(*cells) : Array();
  std::vector<moecalc::Evaluation> results;
  {
    const py::gil_scoped_release release;
    results = committee.evaluate(n_members, atoms_at, cell_vectors);
  }
  std::vector<py::dict> found;
  for (const moecalc::Evaluation& result : results) found.push_back(to_dict(result));
  return found;
}

void bind_committee(py::module_& module) {
  py::class_<HeldCommittee>(module, "Committee",
                            "Several models on one list; the types are those of the first one.")
      .def(py::init<const std::vector<moecalc::Evaluator*>&>(), py::arg("members"))
      .def_property_readonly("size", &HeldCommittee::size)
      .def_property_readonly("cutoff", &HeldCommittee::cutoff, "Angstrom, the largest.")
      .def("set_list", &set_list<HeldCommittee>, py::arg("types"), py::arg("edge_index"),
           py::arg("edge_shift").none(true), py::arg("system_index"), py::arg("n_systems") = 1,
           py::arg("edge_from") = py::none(), py::arg("edge_to") = py::none(), "As for an Evaluator.")
      .def("evaluate", &evaluate_members, py::arg("n_members"), py::arg("positions"),
           py::arg("cells") = py::none(), "Energies, forces and virials of the first n_members models.");
  module.def(
      "deviations",
      [](const Doubles& values, std::optional<double> level) {
        if (values.ndim() != 3 || values.shape(0) == 0) {
          throw moecalc::Error("expected values (n_members, n_rows, width), got " +
                               moecalc::shown(view(values).shape()));
        }
        const int64_t n_rows = values.shape(1);
        const int64_t width = values.shape(2);
        std::vector<const double*> members;
        for (py::ssize_t k = 0; k < values.shape(0); ++k)
          members.push_back(values.data() + k * n_rows * width);
        return moecalc::deviations(members, n_rows, width, level);
      },
      py::arg("values"), py::arg("level") = py::none(),
      "Deviation of each row, sqrt(mean over members of |x - mean|^2), divided by |mean| + level if there is "
      "one.");
}

void bind_layers(py::module_& module) {
  py::class_<moecalc::LayerRunner>(module, "LayerRunner",
                                   "Single layers of the fused kernels, for tests: see one_layer.h.")
      .def(py::init([](const std::string& path, const std::string& dtype) {
             return std::make_unique<moecalc::LayerRunner>(path,
                                                           moecalc::EvaluatorOptions::parse("cpu", dtype));
           }),
           py::arg("path"), py::arg("dtype") = "")
      .def("run", &run_layer, py::arg("types"), py::arg("edge_index"), py::arg("edge_vec"), py::arg("layer"),
           py::arg("inputs"), py::arg("gradients") = std::vector<Doubles>{},
           "Arrays in and out in float64, computed in the dtype of the network.");
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Native core of moecalc. Import it with moecalc._lib.load().";
  bind_errors(module);
  bind_package_files(module);
  bind_evaluator(module);
  bind_committee(module);
  bind_layers(module);
  bind_training(module);
}
