#include "loaded_model.h"

#include <dlfcn.h>
#include <mpi.h>

#include <algorithm>
#include <cstdlib>
#include <fstream>

#include "atom.h"
#include "comm.h"
#include "error.h"
#include "modify.h"
#include "neighbor_map.h"
#include "node.h"
#include "utils.h"

namespace LAMMPS_NS {

namespace {

constexpr int most_threads = 4096;

bool is_ascii(const std::string& text) {
  return std::all_of(text.begin(), text.end(), [](char c) { return static_cast<unsigned char>(c) < 0x80; });
}

/// The text with ? for what is not ASCII: LAMMPS leaves broken UTF-8 of names in an input.
std::string printable(std::string text) {
  const auto is_foreign = [](char c) { return static_cast<unsigned char>(c) >= 0x80; };
  std::replace_if(text.begin(), text.end(), is_foreign, '?');
  return text;
}

/// Folder of libmoecalc.so, which is that of the Python package.
std::string package_folder() {
  Dl_info info;
  if (dladdr(reinterpret_cast<const void*>(&moecalc::version), &info) == 0 || info.dli_fname == nullptr) {
    return ".";
  }
  const std::string file = info.dli_fname;
  const size_t slash = file.rfind('/');
  return slash == std::string::npos ? "." : file.substr(0, slash);
}

/// The package of `pair_coeff * * default`: one word in models/default, which the Python package reads as
/// well.
std::string default_package() {
  const std::string folder = package_folder() + "/models/";
  std::string name;
  std::ifstream(folder + "default") >> name;
  if (name.empty()) {
    throw moecalc::Error(folder +
                         "default: expected the name of the default model here, got none: "
                         "install moecalc again, or name a package of your own");
  }
  return folder + name + ".moe.pt";
}

/// "cuda" and "auto" are spread over the GPUs of a node by the rank within the node.
std::string choose_device(const std::string& device, const Node& node) {
  if (device != "cuda" && device != "auto") return device;
  const char* backend = std::getenv("MOECALC_BACKEND");
  const std::string wanted = backend == nullptr ? "" : backend;
  const bool is_of_cpu = wanted == "fused" || wanted == "plain" || wanted == "cuda-emulation";
  if (device == "auto" && is_of_cpu) return "cpu";
  const int n_devices = moecalc::cuda_device_count();
  if (n_devices == 0) return device == "auto" ? "cpu" : device;
  return "cuda:" + std::to_string(node.rank % n_devices);
}

/// Ranks of the node that use the GPU of this one: all of them where the input names it.
int sharers_on(const std::string& device, const Node& node) {
  if (device != "cuda" && device != "auto") return node.n_ranks;
  return sharers_of(node.rank, node.n_ranks, std::max(1, moecalc::cuda_device_count()));
}

}  // namespace

void LoadedModel::load(const std::string& file, const std::vector<std::string>& labels,
                       const PairSettings& settings) {
  const Node node(world);
  file_ = file;
  evaluator_.reset();
  std::string message;
  try {
    message = open(labels, settings, node);
  } catch (const std::exception& exception) {
    message = exception.what();
    if (message.empty()) message = file + ": cannot be loaded";
  } catch (...) {
    message = file + ": cannot be loaded";
  }
  agree(message);
  map_types(labels, settings.allow_untrained);
  const int n_threads = choose_threads(node.n_cores);
  evaluator_->set_num_threads(n_threads);
  log_model(n_threads);
}

/// Returns what is wrong with a package that can be read; "" if nothing is.
std::string LoadedModel::open(const std::vector<std::string>& labels, const PairSettings& settings,
                              const Node& node) {
  const std::string device = choose_device(settings.device, node);
  const std::string path = path_of_file();
  auto options = moecalc::EvaluatorOptions::parse(device, settings.dtype, settings.precision);
  if (options.device.is_cuda) options.device_sharers = sharers_on(settings.device, node);
  evaluator_ = std::make_unique<moecalc::Evaluator>(path, options);
  std::vector<std::string> used;
  for (const std::string& label : labels) {
    if (label != "NULL") used.push_back(label);
  }
  try {
    evaluator_->check_reference(used);  // and forgets the conditions of the frames
    set_conditions(settings.given);
  } catch (const moecalc::Error& exception) {
    return path + ": " + exception.what();
  }
  return "";
}

std::string LoadedModel::path_of_file() const {
  if (file_ == "default") return default_package();
  if (platform::file_is_readable(file_)) return file_;
  const std::string found = utils::get_potential_file_path(file_);  // looks into LAMMPS_POTENTIALS
  const std::string path = found.empty() ? file_ : found;
  if (!is_ascii(file_) && !platform::file_is_readable(path)) {
    throw moecalc::Error(printable(file_) +
                         ": no such file, for LAMMPS alters characters of an input that are not ASCII: give "
                         "its folder as LAMMPS_POTENTIALS, start in its folder, or rename it");
  }
  return path;
}

void LoadedModel::map_types(const std::vector<std::string>& labels, bool allow_untrained) {
  const std::vector<std::string>& elements = evaluator_->elements();
  const std::vector<std::string>& trained = facts().trained_elements;
  element_of_type_.assign(atom->ntypes + 1, not_mapped);
  for (int type = 1; type <= atom->ntypes; ++type) {
    const std::string& label = labels[type - 1];
    if (label == "NULL") continue;
    const auto found = std::find(elements.begin(), elements.end(), label);
    if (found == elements.end()) {
      error->all(FLERR, "Pair style moe: expected elements of the model {} ({}), got {} for atom type {}",
                 facts().name, joined(elements), label, type);
    }
    if (!allow_untrained && !contains(trained, label)) {
      error->all(FLERR,
                 "Pair style moe: expected elements that the model {} was trained on ({}), got {} for atom "
                 "type {}, which has parameters but no training: use another model, or "
                 "`pair_style moe untrained yes` for arbitrary forces",
                 facts().name, joined(trained), label, type);
    }
    element_of_type_[type] = static_cast<int>(found - elements.begin());
  }
}

/// Stops all ranks if any has a message, which is the first one's; the model is of no use then.
void LoadedModel::agree(const std::string& message) {
  std::string text = message;
  int failed = text.empty() ? comm->nprocs : comm->me;
  int first = 0;
  MPI_Allreduce(&failed, &first, 1, MPI_INT, MPI_MIN, world);
  if (first == comm->nprocs) return;
  int size = static_cast<int>(text.size());
  MPI_Bcast(&size, 1, MPI_INT, first, world);
  text.resize(size);
  MPI_Bcast(text.data(), size, MPI_CHAR, first, world);
  evaluator_.reset();
  const std::string where = first == 0 ? "" : " (on rank " + std::to_string(first) + ")";
  error->all(FLERR, "Pair style moe: " + text + where);
}

void LoadedModel::set_conditions(const moecalc::GivenConditions& given) {
  try {
    conditions_ = evaluator_->set_conditions(given);
  } catch (const moecalc::Error& exception) {
    throw moecalc::Error(std::string(exception.what()) +
                         " (keywords charge, spin and fparam of pair_style moe)");
  }
}

void LoadedModel::give_conditions(const moecalc::GivenConditions& given) {
  std::string message;
  try {
    set_conditions(given);
  } catch (const std::exception& exception) {
    message = file_ + ": " + exception.what();
  }
  agree(message);
  log_conditions();
}

/// Threads of the evaluator, which are its own: LAMMPS and its OpenMP styles go on with theirs. As many as
/// `package omp` says where it is in use, else OMP_NUM_THREADS, else this rank's share of the processors.
/// That package cannot come later: it comes before the box, and models after it.
int LoadedModel::choose_threads(int n_cores) const {
  // Without the package, LAMMPS' own number is 1 where OMP_NUM_THREADS is not set.
  if (modify->get_fix_by_id("package_omp") != nullptr) return std::clamp(comm->nthreads, 1, most_threads);
  const char* text = std::getenv("OMP_NUM_THREADS");
  const int wanted = text == nullptr ? 0 : std::atoi(text);
  return wanted > 0 ? std::min(wanted, most_threads) : n_cores;
}

void LoadedModel::log_model(int n_threads) {
  if (comm->me != 0) return;
  const moecalc::Evaluator& evaluator = *evaluator_;
  utils::logmesg(lmp,
                 "Pair style moe (moecalc {}): model {} from {}\n"
                 "  elements {}; cutoff {} A; {} on {} ({}), {} threads per rank\n",
                 moecalc::version(), facts().name, file_, joined(evaluator.elements()), evaluator.cutoff(),
                 evaluator.dtype(), evaluator.device(), evaluator.backend(), n_threads);
  log_conditions();
  for (const std::string& sentence : evaluator.model_warnings()) {
    error->warning(FLERR, "Pair style moe: " + sentence);
  }
  if (!facts().citation.empty()) utils::logmesg(lmp, "  please cite {}\n", facts().citation);
}

void LoadedModel::log_conditions() {
  if (comm->me != 0) return;
  if (!facts().fixed.empty()) {
    utils::logmesg(lmp, "  {}, which is fixed in this package\n", facts().fixed);
  }
  if (!conditions_.values.empty()) utils::logmesg(lmp, "  {}\n", conditions_.values);
  const std::string defaults = conditions_.defaults.empty() ? "" : file_ + " " + conditions_.defaults;
  if (!defaults.empty() && defaults != told_defaults_) {
    error->warning(FLERR,
                   "Pair style moe: {} not given by pair_style, so the default of the model {} is used",
                   conditions_.defaults, facts().name);
  }
  told_defaults_ = defaults;
}

}  // namespace LAMMPS_NS
