// Python module `moecalc._T`: the state of torch, for what runs torch in Python. Links libmoecalc_torch.so.
#include <pybind11/pybind11.h>

#include <memory>

#include "backends/torchscript/clean_state.h"
#include "backends/torchscript/interface.h"

namespace py = pybind11;

namespace {

/// `with CleanState():` in Python.
struct CleanContext {
  std::unique_ptr<moecalc::CleanState> state;
};

}  // namespace

PYBIND11_MODULE(_T, module) {
  module.doc() =
      "What moecalc needs of torch. Import it with moecalc._torch_lib.load_torch_library(), which loads "
      "libtorch first.";

  module.def("torch_version", &moecalc_torch_version,
             "Version of torch that the library was compiled against.");

  py::class_<CleanContext>(
      module, "CleanState",
      "Context in which torch is, on this thread, as a new thread finds it: see clean_state.h.")
      .def(py::init<>())
      .def("__enter__",
           [](CleanContext& context) { context.state = std::make_unique<moecalc::CleanState>(); })
      .def("__exit__", [](CleanContext& context, const py::args&) { context.state.reset(); });
}
