// Python module `moecalc._C`: numpy in, numpy out, no torch types in any signature.
#include <ATen/ATen.h>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "moecalc/archive.h"
#include "moecalc/clean_state.h"
#include "moecalc/evaluator.h"
#include "moecalc/threads.h"
#include "moecalc/version.h"

namespace py = pybind11;

void bind_training(py::module_& module);  // training_bindings.cpp

namespace {

/// A tensor that shares the array's memory; `array` must outlive it.
template <typename T>
at::Tensor view(const py::array_t<T, py::array::c_style>& array, at::ScalarType dtype) {
  std::vector<int64_t> shape(array.shape(), array.shape() + array.ndim());
  return at::from_blob(const_cast<T*>(array.data()), shape, at::TensorOptions().dtype(dtype));
}

/// Converts to int64, but only from integers: a float index is a mistake of the caller.
py::array_t<int64_t, py::array::c_style> integers(const py::array& array, const char* name) {
  if (array.dtype().kind() != 'i' && array.dtype().kind() != 'u') {
    throw moecalc::Error(std::string("expected `") + name + "` to be an array of integers, got " +
                         py::str(array.dtype()).cast<std::string>());
  }
  return py::array_t<int64_t, py::array::c_style | py::array::forcecast>(array);
}

/// An array that owns the tensor's memory.
py::array_t<double> to_numpy(const at::Tensor& tensor) {
  auto* owned = new at::Tensor(tensor.contiguous());
  const py::capsule owner(owned, [](void* pointer) { delete static_cast<at::Tensor*>(pointer); });
  const std::vector<py::ssize_t> shape(owned->sizes().begin(), owned->sizes().end());
  return py::array_t<double>(shape, owned->const_data_ptr<double>(), owner);
}

/// A numpy view of a tensor's memory, for the time of a callback.
py::array borrow(const at::Tensor& tensor) {
  const std::vector<py::ssize_t> shape(tensor.sizes().begin(), tensor.sizes().end());
  const py::none no_owner;  // any base makes pybind11 share the memory instead of copying it
  if (tensor.scalar_type() == at::kDouble) {
    return py::array_t<double>(shape, tensor.const_data_ptr<double>(), no_owner);
  }
  return py::array_t<float>(shape, tensor.const_data_ptr<float>(), no_owner);
}

/// A GhostExchange written in Python: its methods forward, reverse and sum change an array in place.
class PythonExchange final : public moecalc::GhostExchange {
 public:
  explicit PythonExchange(py::object object) : object_(std::move(object)) {}

  void forward(at::Tensor features) override { call("forward", features); }
  void reverse(at::Tensor gradients) override { call("reverse", gradients); }
  void sum(at::Tensor values) override { call("sum", values); }

 private:
  void call(const char* method, const at::Tensor& tensor) {
    const py::gil_scoped_acquire gil;
    try {
      object_.attr(method)(borrow(tensor));
    } catch (const py::error_already_set& error) {
      const std::string message = error.what();
      throw moecalc::Error(std::string("the ghost exchange failed in `") + method +
                           "`: " + message.substr(0, message.find('\n')));
    }
  }

  py::object object_;
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

py::dict evaluate(moecalc::Evaluator& evaluator, const py::array& types, const py::array& edge_index,
                  const py::array_t<double, py::array::c_style | py::array::forcecast>& edge_vec,
                  const py::array& system_index, int64_t n_systems, bool forces, bool virial,
                  bool atom_virial, const py::object& exchange) {
  const moecalc::CleanState clean;  // tensors that are made here must not belong to a mode of the caller
  const moecalc::TorchThreads one_thread(1);
  const auto types64 = integers(types, "types"), index64 = integers(edge_index, "edge_index"),
             system64 = integers(system_index, "system_index");
  moecalc::AtomicGraph graph;
  graph.types = view<int64_t>(types64, at::kLong);
  graph.edge_index = view<int64_t>(index64, at::kLong);
  graph.edge_vec = view<double>(edge_vec, at::kDouble);
  graph.system_index = view<int64_t>(system64, at::kLong);
  graph.n_systems = n_systems;
  moecalc::Evaluation result;
  PythonExchange python_exchange(exchange);
  {
    // Autograd refuses to run while the GIL is held; other Python threads may go on meanwhile.
    const py::gil_scoped_release release;
    result = evaluator.evaluate(graph, {forces, virial, atom_virial},
                                exchange.is_none() ? nullptr : &python_exchange);
  }
  return to_dict(result);
}

using Doubles = py::array_t<double, py::array::c_style | py::array::forcecast>;

/// The edges' rows of positions are their nodes: periodic images are given by shifts.
void set_list(moecalc::Evaluator& evaluator, const py::array& types, const py::array& edge_index,
              const py::object& edge_shift, const py::array& system_index, int64_t n_systems) {
  const moecalc::CleanState clean;
  const moecalc::TorchThreads one_thread(1);
  // Copies, because the evaluator keeps the list longer than the caller its arrays.
  const auto copy = [](const py::array& array, const char* name) {
    return view<int64_t>(integers(array, name), at::kLong).clone();
  };
  moecalc::NeighborList list;
  list.types = copy(types, "types");
  list.edge_index = copy(edge_index, "edge_index");
  if (list.edge_index.dim() != 2 || list.edge_index.size(0) != 2) {
    throw moecalc::Error("expected `edge_index` of 2 rows, got an array of " +
                         std::to_string(list.edge_index.dim()) + " dimensions and " +
                         std::to_string(list.edge_index.numel()) + " numbers");
  }
  list.edge_from = list.edge_index[0];
  list.edge_to = list.edge_index[1];
  if (!edge_shift.is_none()) list.edge_shift = copy(edge_shift.cast<py::array>(), "edge_shift");
  list.system_index = copy(system_index, "system_index");
  list.n_systems = n_systems;
  const py::gil_scoped_release release;
  evaluator.set_list(list);
}

/// None where the model takes none.
void set_conditions(moecalc::Evaluator& evaluator, const py::object& charge_spin, const py::object& fparam) {
  at::Tensor pairs, numbers;
  if (!charge_spin.is_none()) {
    const auto array = integers(charge_spin.cast<py::array>(), "charge_spin");
    pairs = view<int64_t>(array, at::kLong).clone();
  }
  if (!fparam.is_none()) numbers = view<double>(fparam.cast<Doubles>(), at::kDouble).clone();
  const py::gil_scoped_release release;
  evaluator.set_conditions(pairs, numbers);
}

py::dict evaluate_positions(moecalc::Evaluator& evaluator, const Doubles& positions, const py::object& cells,
                            bool forces, bool virial, bool atom_virial, const py::object& exchange) {
  const moecalc::CleanState clean;
  const moecalc::TorchThreads one_thread(1);
  const at::Tensor x = view<double>(positions, at::kDouble);
  const Doubles cells64 = cells.is_none() ? Doubles() : cells.cast<Doubles>();
  const at::Tensor h = cells.is_none() ? at::Tensor() : view<double>(cells64, at::kDouble);
  moecalc::Evaluation result;
  PythonExchange python_exchange(exchange);
  {
    const py::gil_scoped_release release;
    result = evaluator.evaluate_positions(x, h, {forces, virial, atom_virial},
                                          exchange.is_none() ? nullptr : &python_exchange);
  }
  return to_dict(result);
}

std::vector<at::Tensor> tensors(const std::vector<Doubles>& arrays, at::ScalarType dtype) {
  std::vector<at::Tensor> out;
  for (const Doubles& array : arrays) {
    const std::vector<int64_t> shape(array.shape(), array.shape() + array.ndim());
    out.push_back(
        at::from_blob(const_cast<double*>(array.data()), shape, at::TensorOptions().dtype(at::kDouble))
            .to(dtype, /*non_blocking=*/false, /*copy=*/true));
  }
  return out;
}

/// One layer of the fused kernels: arrays in and out in float64, computed in the evaluator's dtype.
std::vector<py::array_t<double>> run_layer(moecalc::Evaluator& evaluator, const py::array& types_in,
                                           const py::array& edge_index_in, const Doubles& edge_vec,
                                           int64_t layer, const std::vector<Doubles>& inputs,
                                           const std::vector<Doubles>& gradients) {
  const moecalc::CleanState clean;
  const moecalc::TorchThreads one_thread(1);
  const auto types = integers(types_in, "types"), edge_index = integers(edge_index_in, "edge_index");
  moecalc::AtomicGraph graph;
  graph.types = view<int64_t>(types, at::kLong);
  graph.edge_index = view<int64_t>(edge_index, at::kLong);
  graph.edge_vec = tensors({edge_vec}, at::kDouble)[0];
  graph.system_index = at::zeros_like(graph.types);
  const at::ScalarType dtype = evaluator.dtype() == "float64" ? at::kDouble : at::kFloat;
  std::vector<py::array_t<double>> out;
  for (const at::Tensor& tensor :
       evaluator.run_layer(graph, layer, tensors(inputs, dtype), tensors(gradients, dtype))) {
    out.push_back(to_numpy(tensor.to(at::kDouble)));
  }
  return out;
}

/// `with CleanState():` in Python.
struct CleanContext {
  std::unique_ptr<moecalc::CleanState> state;
};

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Native core of moecalc. Import it with moecalc._lib.load(), which loads libtorch first.";

  const py::handle error = py::register_exception<moecalc::Error>(module, "Error", PyExc_RuntimeError);
  py::register_exception<moecalc::OutOfMemoryError>(module, "OutOfMemoryError", error);

  bind_training(module);
  module.def("build_info", &moecalc::build_info, "What the library was built with, as JSON text.");
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

  py::class_<CleanContext>(
      module, "CleanState",
      "Context in which torch is, on this thread, as a new thread finds it: see clean_state.h.")
      .def(py::init<>())
      .def("__enter__",
           [](CleanContext& context) { context.state = std::make_unique<moecalc::CleanState>(); })
      .def("__exit__", [](CleanContext& context, const py::args&) { context.state.reset(); });

  py::class_<moecalc::Evaluator>(module, "Evaluator",
                                 "A model loaded from a package file. Use one per thread.")
      .def(
          py::init<const std::string&, const std::string&, const std::string&, const std::string&, bool>(),
          py::arg("path"), py::arg("device") = "cpu", py::arg("dtype") = "", py::arg("precision") = "fp32",
          py::arg("deterministic") = true, py::call_guard<py::gil_scoped_release>(),
          "device: 'cpu', 'cuda', 'cuda:N' or 'auto'; dtype: 'float32', 'float64' or '' (the package's own); "
          "precision: 'fp32', 'tf32' or 'bf16x3' (products on a GPU).")
      .def_property_readonly("elements", &moecalc::Evaluator::elements)
      .def_property_readonly("cutoff", &moecalc::Evaluator::cutoff)
      .def_property_readonly("angle_cutoff", &moecalc::Evaluator::angle_cutoff)
      .def_property_readonly("dtype", &moecalc::Evaluator::dtype)
      .def_property_readonly("device", &moecalc::Evaluator::device)
      .def_property_readonly("precision", &moecalc::Evaluator::precision)
      .def_property("num_threads", &moecalc::Evaluator::num_threads, &moecalc::Evaluator::set_num_threads,
                    "CPU threads of the evaluations to come; 0: what torch would use.")
      .def_property_readonly("keeps_lists", &moecalc::Evaluator::keeps_lists)
      .def_property_readonly("n_layers", &moecalc::Evaluator::n_layers)
      .def_property_readonly("backend", &moecalc::Evaluator::backend)
      .def_property_readonly("backend_reason", &moecalc::Evaluator::backend_reason)
      .def_property_readonly("buffer_bytes", &moecalc::Evaluator::buffer_bytes)
      .def_property_readonly("metadata", &moecalc::Evaluator::metadata)
      .def_property_readonly("n_packed_groups", &moecalc::Evaluator::n_packed_groups)
      .def("release_weights", &moecalc::Evaluator::release_weights,
           "Give back the weights that are laid out; those of atoms are laid out again.")
      .def(
          "record",
          [](const moecalc::Evaluator& evaluator, const std::string& name) {
            return py::bytes(evaluator.record(name));
          },
          py::arg("name"), "Bytes of one record of the package, for example 'extra/reference.json'.")
      .def("run_layer", &run_layer, py::arg("types"), py::arg("edge_index"), py::arg("edge_vec"),
           py::arg("layer"), py::arg("inputs"), py::arg("gradients") = std::vector<Doubles>{},
           "One layer of the fused kernels alone, for tests: see run_layer in evaluator.h.")
      .def("estimate_bytes", &moecalc::Evaluator::estimate_bytes, py::arg("n_node"), py::arg("n_edge"),
           py::arg("n_angle"),
           "Bytes that the CUDA kernels would need for a system of this size; 0 where others run.")
      .def("check_reference", &moecalc::Evaluator::check_reference,
           py::arg("elements") = std::vector<std::string>{}, py::call_guard<py::gil_scoped_release>(),
           "Raise Error unless stored reference frames that hold these elements (default: all) come out as "
           "stored.")
      .def("set_conditions", &set_conditions, py::arg("charge_spin") = py::none(),
           py::arg("fparam") = py::none(),
           "Charge and multiplicity (K, 2) and frame parameters (K, n) of the structures to come; K is their "
           "number, or 1 for any number. None where the model takes none.")
      .def(
          "give_conditions",
          [](moecalc::Evaluator& evaluator, std::optional<double> charge, std::optional<double> spin,
             std::optional<std::vector<double>> fparam) {
            const py::gil_scoped_release release;
            const auto applied = evaluator.set_conditions({charge, spin, std::move(fparam)});
            return std::pair(applied.values, applied.defaults);
          },
          py::arg("charge") = py::none(), py::arg("spin") = py::none(), py::arg("fparam") = py::none(),
          "The same for all structures to come, from what a user gave, as engines without Python have it: "
          "what is missing has the package's default. Returns texts of all values and of the defaults.")
      .def("set_list", &set_list, py::arg("types"), py::arg("edge_index"), py::arg("edge_shift"),
           py::arg("system_index"), py::arg("n_systems") = 1,
           "The list of the evaluate_positions calls to come; edge_shift (n_edge, 3) counts cells, None: no "
           "images.")
      .def("evaluate_positions", &evaluate_positions, py::arg("positions"), py::arg("cells") = py::none(),
           py::kw_only(), py::arg("forces") = true, py::arg("virial") = true, py::arg("atom_virial") = false,
           py::arg("exchange") = py::none(),
           "As evaluate, of the list that was set, for positions (n_node, 3) and cells (n_systems, 3, 3).")
      .def("evaluate", &evaluate, py::arg("types"), py::arg("edge_index"), py::arg("edge_vec"),
           py::arg("system_index"), py::arg("n_systems") = 1, py::kw_only(), py::arg("forces") = true,
           py::arg("virial") = true, py::arg("atom_virial") = false, py::arg("exchange") = py::none(),
           "Energies (eV), forces (eV/Angstrom) and virials (eV) as a dict of float64 arrays, in the order "
           "of the input.");
}
