// Of libmoecalc.so: finds the TorchScript backend, which is a library of its own because torch is.
#include <dlfcn.h>
#include <unistd.h>

#include <cstdint>
#include <fstream>
#include <iterator>
#include <memory>
#include <string>

#include "backends/torchscript/interface.h"
#include "moecalc/error.h"
#include "moecalc/text.h"

namespace moecalc {
namespace {

using namespace torchscript;

const char* const rebuild =
    "run `pip install .` in the folder of moecalc's sources";  // as BUILD_HERE of moecalc/_install.py

/// Version of torch that a library was compiled against, from its bytes; "" if there is none.
std::string version_in_file(const std::string& path) {
  std::ifstream stream(path, std::ios::binary);
  const std::string bytes((std::istreambuf_iterator<char>(stream)), std::istreambuf_iterator<char>());
  const std::string marker = MOECALC_TORCH_MARKER;
  const size_t found = bytes.find(marker);
  if (found == std::string::npos) return "";
  return printable(bytes.c_str() + found + marker.size(), 40);
}

/// "2.13" of torch's own number.
std::string shown_version(uint64_t number) {
  return std::to_string(number >> 56) + "." + std::to_string(number >> 48 & 0xFF);
}

/// Version of the torch that this process has loaded; "" if it has none, or one that does not tell.
std::string loaded_torch() {
  void* torch = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
  if (torch == nullptr) return "";
  const auto number = reinterpret_cast<uint64_t (*)()>(dlsym(torch, "aoti_torch_abi_version"));
  const std::string version = number == nullptr ? "" : shown_version(number());
  dlclose(torch);
  return version;
}

[[noreturn]] void refuse_to_load(const std::string& path, const std::string& reason) {
  const std::string built = version_in_file(path);
  const std::string running = loaded_torch();
  throw Error(std::string("backend 'torchscript': ") + library_file + ", compiled against torch " +
              (built.empty() ? "of an unknown version" : built) + ", does not load" +
              (running.empty() ? "" : " with torch " + running) + " (" + printable(reason, 300) +
              "): install that torch, or " + rebuild);
}

template <class Function>
Function* find(void* library, const char* name) {
  auto* function = reinterpret_cast<Function*>(dlsym(library, name));
  if (function != nullptr) return function;
  throw Error(std::string("backend 'torchscript': ") + library_file + " has no " + name +
              ", so it is of another build of moecalc: " + rebuild);
}

/// Whether "2.13.0" and "2.13" are of the same minor version.
bool same_minor(const std::string& full, const std::string& minor) {
  return full == minor || full.rfind(minor + ".", 0) == 0;
}

/// Before anything is done with it.
void check_library(void* library) {
  const std::string build = find<moecalc_torch_build_t>(library, "moecalc_torch_build")();
  if (build != build_id()) {
    throw Error(std::string("backend 'torchscript': expected ") + library_file + " of build '" + build_id() +
                "', got '" + build + "': " + rebuild);
  }
  const std::string built = find<moecalc_torch_version_t>(library, "moecalc_torch_version")();
  const std::string running = find<moecalc_running_torch_t>(library, "moecalc_running_torch")();
  if (!running.empty() && !same_minor(built, running)) {
    throw Error(std::string("backend 'torchscript': ") + library_file + " was compiled against torch " +
                built + ", but torch " + running + " is loaded: install that torch, or " + rebuild);
  }
}

}  // namespace

std::unique_ptr<Backend> make_torchscript_backend(const BackendInputs& inputs) {
  const std::string path = place_of_library(library_file);
  if (access(path.c_str(), F_OK) != 0) {
    throw Error(std::string("backend 'torchscript' needs ") + library_file +
                ", which this installation does not have: install torch, then " + rebuild);
  }
  std::string reason;
  void* library = open_library(library_file, reason);
  if (library == nullptr) refuse_to_load(path, reason);
  check_library(library);
  const auto make = find<moecalc_make_torchscript_backend_t>(library, "moecalc_make_torchscript_backend");
  return std::unique_ptr<Backend>(make(&inputs));
}

}  // namespace moecalc
