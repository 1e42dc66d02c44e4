#include "pair_moe.h"

#include <ATen/ATen.h>
#include <dlfcn.h>
#include <torch/cuda.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "atom.h"
#include "comm.h"
#include "condition_keywords.h"
#include "domain.h"
#include "error.h"
#include "exceptions.h"
#include "extremes.h"
#include "force.h"
#include "group.h"
#include "json.h"
#include "memory.h"
#include "modify.h"
#include "moecalc/evaluator.h"
#include "moecalc/threads.h"
#include "neigh_list.h"
#include "neighbor.h"
#include "neighbor_rules.h"
#include "node.h"
#include "type_check.h"
#include "update.h"
#include "utils.h"

namespace LAMMPS_NS {

namespace {

constexpr int not_mapped = -1;

const std::vector<std::string> keywords = {"device", "dtype", "precision", "untrained",
                                           "charge", "spin",  "fparam"};

/// What the package's metadata say that the evaluator does not offer.
struct Description {
  std::string name, citation;
  std::vector<std::string> trained_elements;
  int node_dim = 0;
  int edge_limit = 0, angle_limit = 0;  // 0 = unknown
  std::string fixed;                    // charge, spin and frame parameters that cannot be given any more

  Description() = default;
  explicit Description(const std::string& text) {
    const json metadata = json::parse(text);
    name = metadata.value("name", std::string());
    citation = metadata.value("citation", std::string());
    for (const auto& element : metadata.at("trained_elements")) trained_elements.push_back(element);
    node_dim = metadata.at("dims").at("node");
    if (metadata.contains("neighbor_limits")) {
      edge_limit = metadata["neighbor_limits"].value("edge", 0);
      angle_limit = metadata["neighbor_limits"].value("angle", 0);
    }
    if (!metadata.contains("conditions") || !metadata["conditions"].contains("fixed")) return;
    for (const auto& [condition, value] : metadata["conditions"]["fixed"].items()) {
      if (!value.is_null()) fixed += (fixed.empty() ? "" : ", ") + condition + " " + value.dump();
    }
  }
};

std::string joined(const std::vector<std::string>& words, const std::string& separator = " ") {
  std::string text;
  for (const std::string& word : words) text += (text.empty() ? "" : separator) + word;
  return text;
}

bool contains(const std::vector<std::string>& words, const std::string& word) {
  return std::find(words.begin(), words.end(), word) != words.end();
}

bool is_ascii(const std::string& text) {
  return std::all_of(text.begin(), text.end(), [](char c) { return static_cast<unsigned char>(c) < 0x80; });
}

/// The text with ? for what is not ASCII: LAMMPS leaves broken UTF-8 of names in an input.
std::string printable(std::string text) {
  std::replace_if(
      text.begin(), text.end(), [](char c) { return static_cast<unsigned char>(c) >= 0x80; }, '?');
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

/// "cuda" and "auto" are spread over the GPUs of a node by the rank within the node.
std::string choose_device(const std::string& device, const Node& node) {
  if (device != "cuda" && device != "auto") return device;
  const int n_devices = torch::cuda::is_available() ? static_cast<int>(torch::cuda::device_count()) : 0;
  if (n_devices == 0) return device == "auto" ? "cpu" : device;
  return "cuda:" + std::to_string(node.rank % n_devices);
}

void write_text(FILE* fp, const std::string& text) {
  const int size = static_cast<int>(text.size());
  fwrite(&size, sizeof(int), 1, fp);
  fwrite(text.data(), 1, text.size(), fp);
}

/// Counterpart of write_text; rank 0 reads, all ranks get it.
std::string read_text(FILE* fp, MPI_Comm world, Error* error) {
  int me = 0, size = 0;
  MPI_Comm_rank(world, &me);
  if (me == 0) utils::sfread(FLERR, &size, sizeof(int), 1, fp, nullptr, error);
  MPI_Bcast(&size, 1, MPI_INT, 0, world);
  std::string text(static_cast<size_t>(size), '\0');
  if (size > 0) {
    if (me == 0) utils::sfread(FLERR, text.data(), 1, text.size(), fp, nullptr, error);
    MPI_Bcast(text.data(), size, MPI_CHAR, 0, world);
  }
  return text;
}

}  // namespace

// --- state ---------------------------------------------------------------------------------------

class PairMoE::Impl : public moecalc::GhostExchange {
 public:
  explicit Impl(PairMoE* pair) : pair_(pair) {}

  // from the input script
  std::string device = "auto", dtype;    // dtype "" = the package's own
  std::string precision = "fp32";        // of products on a GPU
  bool allow_untrained = false;          // elements that the model was not trained on
  moecalc::GivenConditions given;        // charge, spin and frame parameters
  std::string file;                      // as given
  std::vector<std::string> type_labels;  // element (or NULL) per atom type, as given

  // from the package
  std::unique_ptr<moecalc::Evaluator> evaluator;
  Description description;
  std::vector<int> element_of_type;  // index 1..ntypes
  double energy_scale = 1.0;         // from eV to the energy unit of the simulation
  int n_cores = 1;                   // of the node, that are this rank's
  int n_threads = 0;                 // in use, and in the log
  bool density_checked = false;
  bool types_checked = false;  // since the model was loaded
  moecalc::AppliedConditions conditions;
  bool conditions_given = false;  // to the evaluator
  std::string told_defaults;      // the last that the log says

  // whether init_style() has been called since the input changed anything of the above
  bool is_ready = false;

  // of the run
  bool run_starts = true;       // nothing has been evaluated since init_style()
  bool warned_of_pair = false;  // two atoms are closer than any training data
  bool warned_of_list = false;  // atoms moved too far for LAMMPS' list
  Displacements displacements;

  // of the current step
  Extremes extremes;  // of all ranks, from check_extremes() on

  // of the current step, where the evaluator takes graphs
  moecalc::AtomicGraph graph;
  std::vector<int64_t> centre, neighbor;
  std::vector<double> edge_vec;

  // since LAMMPS built its list, where the evaluator keeps lists
  moecalc::NeighborList list;
  bool has_list = false;
  double n_lists = 0;                   // made so far
  std::vector<int> kind_of_atom;        // what each atom was when the list was made: see PairMoE::kind
  bigint neighbor_calls = -1;           // of Neighbor::build, when the list was made
  std::vector<int> near_from, near_to;  // pairs that can come closer than min_distance before the next list

  // of either
  std::vector<int> atom_of_row;  // node of the graph -> index of the atom in LAMMPS
  std::vector<int> row_of_atom;  // the inverse; not_mapped if the atom is no node
  std::vector<int> canonical;    // ghost -> atom of the same ID that stands for all of its images
  std::vector<int64_t> types;
  int64_t n_local = 0;

  // --- GhostExchange: LAMMPS knows which atoms are whose ghosts, so it does the communication -----

  void forward(at::Tensor features) override {
    start(features);
    for (int64_t row = 0; row < n_local; ++row)
      std::memcpy(of_atom(atom_of_row[row]), of_row(row), row_bytes_);
    pair_->comm->forward_comm(pair_);
    for (size_t row = n_local; row < atom_of_row.size(); ++row) {
      std::memcpy(of_row(row), of_atom(atom_of_row[row]), row_bytes_);
    }
  }

  void reverse(at::Tensor gradients) override {
    start(gradients);
    // Ghosts may be sent on over several ranks, so all atoms have a row of the buffer, nodes or not.
    for (size_t row = 0; row < atom_of_row.size(); ++row) {
      std::memcpy(of_atom(atom_of_row[row]), of_row(row), row_bytes_);
    }
    pair_->comm->reverse_comm(pair_);
    for (int64_t row = 0; row < n_local; ++row)
      std::memcpy(of_row(row), of_atom(atom_of_row[row]), row_bytes_);
  }

  void sum(at::Tensor values) override {
    MPI_Allreduce(MPI_IN_PLACE, values.mutable_data_ptr<double>(), static_cast<int>(values.numel()),
                  MPI_DOUBLE, MPI_SUM, pair_->world);
  }

  char* of_atom(int atom) { return buffer_.data() + static_cast<size_t>(atom) * row_bytes_; }
  size_t row_bytes() const { return row_bytes_; }

  /// dst += src, both one row.
  void add(char* dst, const double* src) const {
    if (is_float_) {
      add_as<float>(dst, src);
    } else {
      add_as<double>(dst, src);
    }
  }

  /// Doubles of LAMMPS' communication buffers that hold one row.
  static int doubles_per_row(int64_t width, bool is_float) {
    return static_cast<int>(is_float ? (width + 1) / 2 : width);
  }

  double memory() const {
    const double listed = has_list ? static_cast<double>(4 * list.edge_index.size(1) * sizeof(int64_t)) : 0.0;
    return listed +
           static_cast<double>(buffer_.capacity() + edge_vec.capacity() * sizeof(double) +
                               (centre.capacity() + neighbor.capacity() + types.capacity()) *
                                   sizeof(int64_t) +
                               (atom_of_row.capacity() + row_of_atom.capacity() + canonical.capacity() +
                                kind_of_atom.capacity() + near_from.capacity() + near_to.capacity()) *
                                   sizeof(int)) +
           displacements.memory();
  }

 private:
  void start(const at::Tensor& tensor) {
    is_float_ = tensor.scalar_type() == at::kFloat;
    const int size = doubles_per_row(tensor.size(1), is_float_);
    if (size != pair_->comm_forward || static_cast<size_t>(tensor.size(0)) != atom_of_row.size()) {
      throw moecalc::Error("expected features of " + std::to_string(atom_of_row.size()) +
                           " atoms and width " + std::to_string(description.node_dim) + ", got " +
                           std::to_string(tensor.size(0)) + " x " + std::to_string(tensor.size(1)) +
                           ": package the checkpoint again");
    }
    data_ = static_cast<char*>(tensor.data_ptr());
    row_bytes_ = static_cast<size_t>(tensor.size(1)) * tensor.element_size();
    const size_t n_atom = row_of_atom.size();
    buffer_.assign(n_atom * row_bytes_, 0);
  }

  char* of_row(size_t row) { return data_ + row * row_bytes_; }

  template <typename T>
  void add_as(char* dst, const double* src) const {
    auto* sum = reinterpret_cast<T*>(dst);
    const auto* summand = reinterpret_cast<const T*>(src);
    for (size_t k = 0; k < row_bytes_ / sizeof(T); ++k) sum[k] += summand[k];
  }

  PairMoE* pair_;
  char* data_ = nullptr;
  size_t row_bytes_ = 0;
  bool is_float_ = false;
  std::vector<char> buffer_;  // one row per atom of LAMMPS, ghosts included
};

// --- set-up --------------------------------------------------------------------------------------

PairMoE::PairMoE(LAMMPS* lmp) : Pair(lmp), impl(std::make_unique<Impl>(this)) {
  single_enable = 0;
  restartinfo = 1;
  one_coeff = 1;
  manybody_flag = 1;
  respa_enable = 0;
  no_virial_fdotr_compute = 1;
  centroidstressflag = CENTROID_AVAIL;
  unit_convert_flag = utils::get_supported_conversions(utils::ENERGY);
}

PairMoE::~PairMoE() {
  if (allocated) {
    memory->destroy(setflag);
    memory->destroy(cutsq);
  }
}

void PairMoE::allocate() {
  allocated = 1;
  const int n = atom->ntypes + 1;
  memory->create(setflag, n, n, "pair:setflag");
  memory->create(cutsq, n, n, "pair:cutsq");
  for (int i = 1; i < n; ++i) {
    for (int j = 1; j < n; ++j) setflag[i][j] = 0;
  }
}

void PairMoE::settings(int narg, char** arg) {
  std::string device = "auto", dtype, precision = "fp32";
  bool allow_untrained = false;
  moecalc::GivenConditions given;
  const std::vector<std::string> words(arg, arg + narg);
  std::vector<std::string> seen;
  for (size_t i = 0; i < words.size();) {
    const std::string& keyword = words[i];
    if (!contains(keywords, keyword)) {
      error->all(FLERR, "Pair style moe: expected keyword {} or {}, got {}",
                 joined({keywords.begin(), keywords.end() - 1}, ", "), keywords.back(), keyword);
    }
    if (contains(seen, keyword)) {
      error->all(FLERR, "Pair style moe: expected keyword {} once, got it twice", keyword);
    }
    seen.push_back(keyword);
    if (is_condition_keyword(keyword)) {
      try {
        i = read_condition(words, i, keywords, given);
      } catch (const moecalc::Error& exception) {
        error->all(FLERR, "Pair style moe: " + std::string(exception.what()));
      }
      continue;
    }
    if (i + 1 == words.size()) {
      error->all(FLERR, "Pair style moe: expected a value after keyword {}", keyword);
    }
    const std::string& value = words[i + 1];
    i += 2;
    if (keyword == "device") {
      const bool known = value == "auto" || value == "cpu" || value == "cuda" || value.rfind("cuda:", 0) == 0;
      if (!known) {
        error->all(FLERR, "Pair style moe: expected device auto, cpu, cuda or cuda:N, got {}", value);
      }
      device = value;
    } else if (keyword == "dtype") {
      if (value != "float32" && value != "float64") {
        error->all(FLERR, "Pair style moe: expected dtype float32 or float64, got {}", value);
      }
      dtype = value;
    } else if (keyword == "precision") {
      if (value != "fp32" && value != "tf32" && value != "bf16x3") {
        error->all(FLERR, "Pair style moe: expected precision fp32, tf32 or bf16x3, got {}", value);
      }
      precision = value;
    } else {
      if (value != "yes" && value != "no") {
        error->all(FLERR, "Pair style moe: expected untrained yes or no, got {}", value);
      }
      allow_untrained = value == "yes";
    }
  }
  check_units();
  if (device != impl->device || dtype != impl->dtype || precision != impl->precision) {
    impl->evaluator.reset();  // loaded again in init_style()
    impl->is_ready = false;
  }
  if (!same(given, impl->given)) impl->conditions_given = impl->is_ready = false;
  impl->device = device;
  impl->dtype = dtype;
  impl->precision = precision;
  impl->allow_untrained = allow_untrained;
  impl->given = given;
}

void PairMoE::check_units() {
  const std::string units = update->unit_style;
  if (units != "metal" && units != "real") {
    error->all(FLERR, "Pair style moe: expected units metal or real, got {}", units);
  }
  impl->energy_scale = units == "real" ? utils::get_conversion_factor(utils::ENERGY, utils::METAL2REAL) : 1.0;
}

void PairMoE::coeff(int narg, char** arg) {
  const int n_types = atom->ntypes;
  if (narg < 3 || std::string(arg[0]) != "*" || std::string(arg[1]) != "*") {
    error->all(FLERR, "Pair style moe: expected pair_coeff * * FILE ELEMENT ..., one element per atom type");
  }
  const std::vector<std::string> labels(arg + 3, arg + narg);
  if (static_cast<int>(labels.size()) != n_types) {
    error->all(FLERR, "Pair style moe: expected {} elements in pair_coeff, one per atom type, got {} ({})",
               n_types, labels.size(), labels.empty() ? "none" : joined(labels));
  }
  if (force->pair == this && contains(labels, "NULL")) {
    error->all(
        FLERR,
        "Pair style moe: expected an element for every atom type, got NULL: NULL is for pair_style hybrid, "
        "where another style describes these atoms");
  }
  impl->file = arg[2];
  impl->type_labels = labels;
  load_model();

  if (!allocated) allocate();
  for (int i = 1; i <= n_types; ++i) {
    for (int j = i; j <= n_types; ++j) {
      setflag[i][j] = impl->element_of_type[i] != not_mapped && impl->element_of_type[j] != not_mapped;
    }
  }
}

/// Load the package on every rank. The outcome is agreed upon, so that no rank goes on when another failed.
void PairMoE::load_model() {
  check_units();
  const Node node(world);
  impl->evaluator.reset();
  impl->density_checked = false;
  impl->types_checked = impl->conditions_given = impl->is_ready = false;
  std::string path = impl->file, message;
  if (path == "default") {
    path = package_folder() + "/models/metals10.moe.pt";
  } else if (!platform::file_is_readable(path)) {
    const std::string found = utils::get_potential_file_path(path);  // looks into LAMMPS_POTENTIALS
    if (!found.empty()) path = found;
  }
  try {
    if (!is_ascii(impl->file) && !platform::file_is_readable(path)) {
      throw moecalc::Error(
          printable(impl->file) +
          ": no such file, for LAMMPS alters characters of an input that are not ASCII: give "
          "its folder as LAMMPS_POTENTIALS, start in its folder, or rename it");
    }
    impl->has_list = false;
    impl->evaluator = std::make_unique<moecalc::Evaluator>(path, choose_device(impl->device, node),
                                                           impl->dtype, impl->precision);
    impl->description = Description(impl->evaluator->metadata());
    std::vector<std::string> used;
    for (const std::string& label : impl->type_labels) {
      if (label != "NULL") used.push_back(label);
    }
    try {
      impl->evaluator->check_reference(used);  // and forgets the conditions of the frames
      set_conditions();
    } catch (const moecalc::Error& exception) {
      message = path + ": " + exception.what();
    }
  } catch (const std::exception& exception) {
    message = exception.what();
    if (message.empty()) message = path + ": cannot be loaded";
  } catch (...) {
    message = path + ": cannot be loaded";
  }

  agree(message);

  const std::vector<std::string>& elements = impl->evaluator->elements();
  impl->element_of_type.assign(atom->ntypes + 1, not_mapped);
  for (int type = 1; type <= atom->ntypes; ++type) {
    const std::string& label = impl->type_labels[type - 1];
    if (label == "NULL") continue;
    const auto found = std::find(elements.begin(), elements.end(), label);
    if (found == elements.end()) {
      error->all(FLERR, "Pair style moe: expected elements of the model {} ({}), got {} for atom type {}",
                 impl->description.name, joined(elements), label, type);
    }
    if (!impl->allow_untrained && !contains(impl->description.trained_elements, label)) {
      error->all(FLERR,
                 "Pair style moe: expected elements that the model {} was trained on ({}), got {} for atom "
                 "type {}, which has "
                 "parameters but no training: use another model, or `pair_style moe untrained yes` for "
                 "arbitrary forces",
                 impl->description.name, joined(impl->description.trained_elements), label, type);
    }
    impl->element_of_type[type] = static_cast<int>(found - elements.begin());
  }

  const bool is_float = impl->evaluator->dtype() == "float32";
  comm_forward = comm_reverse = Impl::doubles_per_row(impl->description.node_dim, is_float);
  impl->n_threads = choose_threads(node.n_cores);
  impl->evaluator->set_num_threads(impl->n_threads);
  log_model();
}

/// Stops all ranks if any has a message, which is the first one's; the model is of no use then.
void PairMoE::agree(const std::string& message) {
  std::string text = message;
  int failed = text.empty() ? comm->nprocs : comm->me, first = 0;
  MPI_Allreduce(&failed, &first, 1, MPI_INT, MPI_MIN, world);
  if (first == comm->nprocs) return;
  int size = static_cast<int>(text.size());
  MPI_Bcast(&size, 1, MPI_INT, first, world);
  text.resize(size);
  MPI_Bcast(text.data(), size, MPI_CHAR, first, world);
  impl->evaluator.reset();
  const std::string where = first == 0 ? "" : " (on rank " + std::to_string(first) + ")";
  error->all(FLERR, "Pair style moe: " + text + where);
}

void PairMoE::set_conditions() {
  try {
    impl->conditions = impl->evaluator->set_conditions(impl->given);
  } catch (const moecalc::Error& exception) {
    throw moecalc::Error(std::string(exception.what()) +
                         " (keywords charge, spin and fparam of pair_style moe)");
  }
  impl->conditions_given = true;
}

/// Other charge, spin or frame parameters for the model that is loaded.
void PairMoE::give_conditions() {
  std::string message;
  try {
    set_conditions();
  } catch (const std::exception& exception) {
    message = impl->file + ": " + exception.what();
  }
  agree(message);
  log_conditions();
}

/// Threads of the evaluator, which are its own: LAMMPS and its OpenMP styles go on with theirs. As many as
/// `package omp` says where it is in use, else OMP_NUM_THREADS, else this rank's share of the processors.
/// That package cannot come later: it comes before the box, and models after it.
int PairMoE::choose_threads(int n_cores) const {
  // Without the package, LAMMPS' own number is 1 where OMP_NUM_THREADS is not set.
  if (modify->get_fix_by_id("package_omp") != nullptr) return std::clamp(comm->nthreads, 1, 4096);
  const char* text = std::getenv("OMP_NUM_THREADS");
  const int wanted = text == nullptr ? 0 : std::atoi(text);
  return wanted > 0 ? std::min(wanted, 4096) : n_cores;
}

void PairMoE::log_model() {
  if (comm->me != 0) return;
  const moecalc::Evaluator& evaluator = *impl->evaluator;
  utils::logmesg(lmp,
                 "Pair style moe (moecalc {}): model {} from {}\n"
                 "  elements {}; cutoff {} A; {} on {} ({}), {} threads per rank\n",
                 moecalc::version(), impl->description.name, impl->file, joined(evaluator.elements()),
                 evaluator.cutoff(), evaluator.dtype(), evaluator.device(), evaluator.backend(),
                 impl->n_threads);
  log_conditions();
  if (evaluator.backend() == "torchscript") {
    error->warning(FLERR,
                   "Pair style moe: evaluated through TorchScript, several times slower than the {} kernels "
                   "({})",
                   evaluator.device() == "cpu" ? "fused" : "CUDA", evaluator.backend_reason());
  }
  if (!impl->description.citation.empty()) {
    utils::logmesg(lmp, "  please cite {}\n", impl->description.citation);
  }
}

void PairMoE::log_conditions() {
  if (comm->me != 0) return;
  Impl& s = *impl;
  if (!s.description.fixed.empty()) {
    utils::logmesg(lmp, "  {}, which is fixed in this package\n", s.description.fixed);
  }
  if (!s.conditions.values.empty()) utils::logmesg(lmp, "  {}\n", s.conditions.values);
  const std::string defaults = s.conditions.defaults.empty() ? "" : s.file + " " + s.conditions.defaults;
  if (!defaults.empty() && defaults != s.told_defaults) {
    error->warning(FLERR,
                   "Pair style moe: {} not given by pair_style, so the default of the model {} is used",
                   s.conditions.defaults, s.description.name);
  }
  s.told_defaults = defaults;
}

void PairMoE::init_style() {
  if (force->newton_pair == 0) error->all(FLERR, "Pair style moe: expected newton on, got newton pair off");
  if (atom->tag_enable == 0) error->all(FLERR, "Pair style moe: expected atom IDs, got atom_modify id no");
  check_units();
  if (impl->evaluator == nullptr) load_model();  // from a restart file, or after another pair_style command
  if (!impl->conditions_given) give_conditions();
  impl->density_checked = false;
  impl->has_list = false;
  impl->run_starts = true;
  impl->warned_of_pair = impl->warned_of_list = false;
  impl->displacements.reset();
  if (!impl->types_checked) TypeCheck(lmp).warn(impl->type_labels);
  impl->types_checked = true;

  // A hybrid style read the size of our exchange before the model was known.
  if (force->pair != nullptr && force->pair != this) {
    force->pair->comm_forward = std::max(force->pair->comm_forward, comm_forward);
    force->pair->comm_reverse = std::max(force->pair->comm_reverse, comm_reverse);
  }
  // Images are found by atom ID.
  if (atom->map_style == Atom::MAP_NONE) {
    atom->map_user = Atom::MAP_YES;
    atom->map_init();
    atom->map_set();
  }
  neighbor->add_request(this, NeighConst::REQ_FULL);
  impl->is_ready = true;
}

double PairMoE::init_one(int /*i*/, int /*j*/) { return impl->evaluator->cutoff(); }

// --- restart -------------------------------------------------------------------------------------

void PairMoE::write_restart(FILE* fp) {
  write_restart_settings(fp);
  write_text(fp, impl->file);
  write_text(fp, joined(impl->type_labels));
}

/// The model itself is loaded in init_style(), so that a pair_coeff command can name another file before.
void PairMoE::read_restart(FILE* fp) {
  read_restart_settings(fp);
  impl->file = read_text(fp, world, error);
  impl->type_labels = utils::split_words(read_text(fp, world, error));
  if (impl->file.empty()) return;
  if (!allocated) allocate();
  for (int i = 1; i <= atom->ntypes; ++i) {
    for (int j = i; j <= atom->ntypes; ++j) setflag[i][j] = 1;
  }
}

void PairMoE::write_restart_settings(FILE* fp) {
  write_text(fp, impl->device);
  write_text(fp, impl->dtype);
  write_text(fp, impl->precision);
  // in one text, so that the files of versions that knew no conditions can be read
  std::vector<std::string> words = condition_words(impl->given);
  words.insert(words.begin(), impl->allow_untrained ? "yes" : "no");
  write_text(fp, joined(words));
}

void PairMoE::read_restart_settings(FILE* fp) {
  impl->device = read_text(fp, world, error);
  impl->dtype = read_text(fp, world, error);
  impl->precision = read_text(fp, world, error);
  const std::vector<std::string> words = utils::split_words(read_text(fp, world, error));
  impl->allow_untrained = !words.empty() && words[0] == "yes";
  impl->given = {};
  try {
    for (size_t i = 1; i < words.size();) {
      if (!is_condition_keyword(words[i])) throw moecalc::Error("expected a keyword, got " + words[i]);
      i = read_condition(words, i, keywords, impl->given);
    }
  } catch (const moecalc::Error& exception) {
    error->all(FLERR, "Pair style moe: damaged restart file: " + std::string(exception.what()));
  }
}

// --- every step ----------------------------------------------------------------------------------

/// Groups whose atoms are excluded from all interactions, as a bit mask. Such atoms are absent: fix gcmc
/// hides an atom that it tries to delete in this way, and the energy of an isolated atom, which is not zero,
/// must not stay behind.
int PairMoE::hidden_groups() const {
  int hidden = 0;
  for (int m = 0; m < neighbor->nex_group; ++m) {
    // not ex1_bit and ex2_bit, which are made at the next init
    const int first = group->bitmask[neighbor->ex1_group[m]], second = group->bitmask[neighbor->ex2_group[m]];
    if (second == 1) hidden |= first;
    if (first == 1) hidden |= second;
  }
  return hidden;
}

/// What the model sees of an atom: its element, or not_mapped if it is absent.
int PairMoE::kind(int i, int hidden) const {
  return (atom->mask[i] & hidden) != 0 ? not_mapped : impl->element_of_type[atom->type[i]];
}

void PairMoE::add_node(int i, int kind) {
  impl->row_of_atom[i] = static_cast<int>(impl->atom_of_row.size());
  impl->atom_of_row.push_back(i);
  impl->types.push_back(kind);
}

/// The owned atoms become the first nodes.
void PairMoE::start_nodes(int hidden) {
  Impl& s = *impl;
  const int n_local = atom->nlocal, n_all = n_local + atom->nghost;
  s.row_of_atom.assign(n_all, not_mapped);
  s.canonical.assign(n_all, not_mapped);
  s.atom_of_row.clear();
  s.types.clear();
  for (int i = 0; i < n_local; ++i) {
    if (const int element = kind(i, hidden); element != not_mapped) add_node(i, element);
  }
  s.n_local = static_cast<int64_t>(s.atom_of_row.size());
}

/// Node of a neighbour. All images of an atom are one node: an owned atom if this rank owns it, else one
/// ghost. With one rank, there are no ghosts.
int PairMoE::node_of(int j, int kind) {
  int& k = impl->canonical[j];
  if (k == not_mapped) k = j < atom->nlocal ? j : atom->map(atom->tag[j]);
  if (k < 0 || (comm->nprocs == 1 && k >= atom->nlocal)) {
    error->one(FLERR, "Pair style moe: ghost of atom {} without its atom: was an atom lost?", atom->tag[j]);
  }
  if (impl->row_of_atom[k] == not_mapped) add_node(k, kind);
  return impl->row_of_atom[k];
}

double PairMoE::distance2(int i, int j) const {
  const double *a = atom->x[i], *b = atom->x[j];
  const double d[3] = {b[0] - a[0], b[1] - a[1], b[2] - a[2]};
  return d[0] * d[0] + d[1] * d[1] + d[2] * d[2];
}

void PairMoE::check_positions() {
  double** const x = atom->x;
  for (int i = 0; i < atom->nlocal; ++i) {
    if (!std::isfinite(x[i][0] + x[i][1] + x[i][2])) {
      error->one(FLERR, "Pair style moe: position of atom {} is not finite: {} {} {}", atom->tag[i], x[i][0],
                 x[i][1], x[i][2]);
    }
  }
}

std::string PairMoE::overlap(const Extremes& pair) {
  return fmt::format(
      "Pair style moe: expected distinct positions, got {} both at {:.8g} {:.8g} {:.8g}: remove the "
      "duplicate, "
      "for example with delete_atoms overlap",
      pair.pair(), pair.x[0], pair.x[1], pair.x[2]);
}

/// Keeps the pair if it is the closest so far.
void PairMoE::note_pair(int i, int j, double distance2) {
  Extremes& closest = impl->extremes;
  const auto first = static_cast<double>(atom->tag[i]);
  if (distance2 > closest.distance2 || (distance2 == closest.distance2 && first >= closest.first)) return;
  closest.distance2 = distance2;
  closest.first = first;
  closest.second = static_cast<double>(atom->tag[j]);
  std::copy_n(atom->x[i], 3, closest.x);
}

/// What all ranks know before they evaluate. Where a run starts, atoms that are too close are an error; later
/// they may be meant (a collision, a trial of fix gcmc), and one warning per run does.
void PairMoE::check_extremes(int hidden) {
  Impl& s = *impl;
  s.extremes.moved2 = s.displacements.largest2(atom->x, atom->nlocal, neighbor->ncalls,
                                               [&](int i) { return kind(i, hidden) != not_mapped; });
  if (comm->nprocs > 1) s.extremes.reduce(world);
  const Extremes& all = s.extremes;
  const bool too_close = all.distance2 < min_distance * min_distance;
  if (too_close && s.run_starts) {
    if (all.distance2 == 0.0) error->all(FLERR, overlap(all));
    error->all(FLERR,
               "Pair style moe: {} are {:.3f} A apart, expected at least {:g} A where a run starts: move or "
               "remove one of them (for example with delete_atoms overlap), and check the box and the units",
               all.pair(), all.distance(), min_distance);
  }
  s.run_starts = false;
  if (too_close && !s.warned_of_pair) {
    s.warned_of_pair = true;
    if (comm->me == 0) {
      error->warning(
          FLERR,
          "Pair style moe: {} are {:.3f} A apart at step {}: below {:g} A there is no training data "
          "and the energies mean nothing, unless a short-range guard such as zbl is added (said "
          "once per run)",
          all.pair(), all.distance(), update->ntimestep, min_distance);
    }
  }
  if (!s.warned_of_list && 4.0 * all.moved2 > neighbor->skin * neighbor->skin * (1.0 + 1e-9)) {
    s.warned_of_list = true;
    if (comm->me == 0) {
      error->warning(
          FLERR,
          "Pair style moe: at step {} an atom is {:.3g} A from where it was when the neighbor list "
          "was built, more than half of the skin of {:g} A: neighbors may be missing. Use "
          "`neigh_modify every 1 delay 0 check yes once no` or a larger skin (said once per run)",
          update->ntimestep, std::sqrt(all.moved2), neighbor->skin);
    }
  }
}

/// From LAMMPS' neighbour list to the graph of this step. Only atoms within the cutoff become nodes.
void PairMoE::build_graph() {
  Impl& s = *impl;
  const int hidden = hidden_groups();
  start_nodes(hidden);
  s.centre.clear();
  s.neighbor.clear();
  s.edge_vec.clear();
  double** const x = atom->x;
  // A hair above the cutoff: the evaluator has the last word on which edges are inside.
  const double reach2 = s.evaluator->cutoff() * s.evaluator->cutoff() * (1.0 + 1e-12);
  for (int ii = 0; ii < list->inum; ++ii) {
    const int i = list->ilist[ii];
    const int row = s.row_of_atom[i];
    if (row == not_mapped) continue;
    const int* const neighbors = list->firstneigh[i];
    for (int jj = 0; jj < list->numneigh[i]; ++jj) {
      const int j = neighbors[jj] & NEIGHMASK;
      const double d[3] = {x[j][0] - x[i][0], x[j][1] - x[i][1], x[j][2] - x[i][2]};
      const double distance2 = d[0] * d[0] + d[1] * d[1] + d[2] * d[2];
      if (distance2 > reach2) continue;
      const int element = kind(j, hidden);
      if (element == not_mapped) continue;
      note_pair(i, j, distance2);
      s.neighbor.push_back(node_of(j, element));
      s.centre.push_back(row);
      s.edge_vec.insert(s.edge_vec.end(), d, d + 3);
    }
  }

  const auto n_edge = static_cast<int64_t>(s.centre.size());
  s.graph.types = at::from_blob(s.types.data(), {static_cast<int64_t>(s.types.size())}, at::kLong);
  s.graph.edge_index = at::empty({2, n_edge}, at::kLong);
  auto* edge_index = s.graph.edge_index.mutable_data_ptr<int64_t>();
  std::copy(s.centre.begin(), s.centre.end(), edge_index);
  std::copy(s.neighbor.begin(), s.neighbor.end(), edge_index + n_edge);
  s.graph.edge_vec = at::from_blob(s.edge_vec.data(), {n_edge, 3}, at::kDouble);
  s.graph.system_index = at::zeros({s.n_local}, at::kLong);
}

/// Whether the evaluator's list still describes LAMMPS' atoms. LAMMPS says when it built its own anew, and
/// that is the only time when atoms are renumbered; but fixes change types and groups in between (fix
/// atom/swap, fix gcmc). A box that changes is no reason: positions of images are LAMMPS' own.
bool PairMoE::list_is_current() const {
  const Impl& s = *impl;
  const int n_all = atom->nlocal + atom->nghost;
  if (!s.has_list || neighbor->ago == 0 || neighbor->ncalls != s.neighbor_calls ||
      static_cast<int>(s.kind_of_atom.size()) != n_all) {
    return false;
  }
  const int hidden = hidden_groups();
  for (int i = 0; i < n_all; ++i) {
    if (kind(i, hidden) != s.kind_of_atom[i]) return false;
  }
  return true;
}

/// From LAMMPS' neighbour list, skin included, to the evaluator's: positions are those of LAMMPS' atoms.
void PairMoE::build_list() {
  Impl& s = *impl;
  const int hidden = hidden_groups();
  const int n_all = atom->nlocal + atom->nghost;
  s.has_list = false;
  s.kind_of_atom.resize(n_all);
  for (int i = 0; i < n_all; ++i) s.kind_of_atom[i] = kind(i, hidden);
  start_nodes(hidden);
  // While LAMMPS keeps its list, no atom is further than half of the skin from where it was at the start;
  // twice that if our list comes later than LAMMPS' own.
  const double near = min_distance + (neighbor->ago == 0 ? 1.1 : 2.1) * neighbor->skin, near2 = near * near;
  s.near_from.clear();
  s.near_to.clear();
  int64_t most = 0;
  for (int ii = 0; ii < list->inum; ++ii) most += list->numneigh[list->ilist[ii]];
  at::Tensor index = at::empty({2, most}, at::kLong), from = at::empty({most}, at::kLong),
             to = at::empty({most}, at::kLong);
  auto* const centres = index.mutable_data_ptr<int64_t>();
  auto* const neighbors = centres + most;
  auto* const rows_from = from.mutable_data_ptr<int64_t>();
  auto* const rows_to = to.mutable_data_ptr<int64_t>();
  int64_t n_edge = 0;
  for (int ii = 0; ii < list->inum; ++ii) {
    const int i = list->ilist[ii];
    const int row = s.row_of_atom[i];
    if (row == not_mapped) continue;
    for (int jj = 0; jj < list->numneigh[i]; ++jj) {
      const int j = list->firstneigh[i][jj] & NEIGHMASK;
      if (s.kind_of_atom[j] == not_mapped) continue;
      neighbors[n_edge] = node_of(j, s.kind_of_atom[j]);
      centres[n_edge] = row;
      rows_from[n_edge] = i;
      rows_to[n_edge] = j;
      ++n_edge;
      if (atom->tag[i] <= atom->tag[j] && distance2(i, j) <= near2) {
        s.near_from.push_back(i);
        s.near_to.push_back(j);
      }
    }
  }
  s.list.types = at::from_blob(s.types.data(), {static_cast<int64_t>(s.types.size())}, at::kLong).clone();
  s.list.edge_index = index.narrow(1, 0, n_edge).contiguous();
  s.list.edge_from = from.narrow(0, 0, n_edge);
  s.list.edge_to = to.narrow(0, 0, n_edge);
  s.list.system_index = at::zeros({s.n_local}, at::kLong);
  s.evaluator->set_list(s.list);
  s.neighbor_calls = neighbor->ncalls;
  ++s.n_lists;
  s.has_list = true;
}

/// Energies and forces of this step.
moecalc::Evaluation PairMoE::evaluate(const moecalc::Request& request) {
  Impl& s = *impl;
  const moecalc::TorchThreads one_thread(1);
  // All ranks take part in every exchange, also those without atoms; one rank alone has none to make.
  moecalc::GhostExchange* exchange = comm->nprocs > 1 ? impl.get() : nullptr;
  const int hidden = hidden_groups();
  NeighborRules(lmp).check(list, s.element_of_type, hidden);
  check_positions();
  s.extremes = Extremes();
  if (!s.evaluator->keeps_lists()) {
    build_graph();
    check_extremes(hidden);
    return s.evaluator->evaluate(s.graph, request, exchange);
  }
  if (!list_is_current()) build_list();
  for (size_t k = 0; k < s.near_from.size(); ++k) {
    note_pair(s.near_from[k], s.near_to[k], distance2(s.near_from[k], s.near_to[k]));
  }
  check_extremes(hidden);
  const int n_all = atom->nlocal + atom->nghost;
  const at::Tensor positions =
      n_all == 0 ? at::empty({0, 3}, at::kDouble) : at::from_blob(atom->x[0], {n_all, 3}, at::kDouble);
  return s.evaluator->evaluate_positions(positions, at::Tensor(), request, exchange);
}

void PairMoE::compute(int eflag, int vflag) {
  if (!impl->is_ready) {
    error->all(
        FLERR,
        "Pair style moe: pair_style or pair_coeff changed the model since the last run: expected a run "
        "with `pre yes`, got `pre no`");
  }
  ev_init(eflag, vflag);

  moecalc::Request request;
  request.virial = vflag_global != 0;
  request.atom_virial = vflag_atom != 0 || cvflag_atom != 0;
  moecalc::Evaluation result;
  std::string message;
  bool out_of_memory = false;
  try {
    result = evaluate(request);
  } catch (const LAMMPSException&) {
    throw;
  } catch (const moecalc::OutOfMemoryError& exception) {
    message = exception.what();
    out_of_memory = true;
  } catch (const std::bad_alloc&) {
    message = "out of memory";
    out_of_memory = true;
  } catch (const std::exception& exception) {
    message = exception.what();
  } catch (...) {
    message = "unknown error";
  }
  if (!message.empty())
    fail(message, out_of_memory,
         message.find("expected finite") != std::string::npos ||
             message.find("expected distinct positions") != std::string::npos);
  if (!impl->density_checked) {
    warn_about_density(static_cast<int>(result.max_neighbors), static_cast<int>(result.max_angle_neighbors));
  }

  const double scale = impl->energy_scale;
  const std::vector<int>& atom_of_row = impl->atom_of_row;
  const auto* force_of = result.forces.const_data_ptr<double>();
  double** const f = atom->f;
  for (size_t row = 0; row < atom_of_row.size(); ++row) {
    for (int k = 0; k < 3; ++k) f[atom_of_row[row]][k] += scale * force_of[3 * row + k];
  }
  if (eflag_global) eng_vdwl += scale * result.energy.item<double>();
  if (eflag_atom) {
    const auto* energy_of = result.energies.const_data_ptr<double>();
    for (int64_t row = 0; row < impl->n_local; ++row) eatom[atom_of_row[row]] += scale * energy_of[row];
  }
  // LAMMPS' orders: xx yy zz xy xz yz, and for centroid virials (first index position, second force) yx zx zy
  // in addition.
  constexpr int first[9] = {0, 1, 2, 0, 0, 1, 1, 2, 2}, second[9] = {0, 1, 2, 1, 2, 2, 0, 0, 1};
  if (vflag_global) {
    const auto* w = result.virial.const_data_ptr<double>();
    for (int k = 0; k < 6; ++k) {
      virial[k] += 0.5 * scale * (w[3 * first[k] + second[k]] + w[3 * second[k] + first[k]]);
    }
  }
  if (request.atom_virial) {
    const auto* w = result.atom_virial.const_data_ptr<double>();
    for (size_t row = 0; row < atom_of_row.size(); ++row, w += 9) {
      const int i = atom_of_row[row];
      for (int k = 0; vflag_atom && k < 6; ++k) {
        vatom[i][k] += 0.5 * scale * (w[3 * first[k] + second[k]] + w[3 * second[k] + first[k]]);
      }
      for (int k = 0; cvflag_atom && k < 9; ++k) cvatom[i][k] += scale * w[3 * first[k] + second[k]];
    }
  }
}

/// Once per run: all neighbours are used, but a structure denser than any in training is worth a warning.
void PairMoE::warn_about_density(int max_neighbors, int max_angle_neighbors) {
  impl->density_checked = true;
  std::array<int, 2> most = {max_neighbors, max_angle_neighbors};
  MPI_Allreduce(MPI_IN_PLACE, most.data(), 2, MPI_INT, MPI_MAX, world);
  const std::array<int, 2> limit = {impl->description.edge_limit, impl->description.angle_limit};
  const std::array<double, 2> radius = {impl->evaluator->cutoff(), impl->evaluator->angle_cutoff()};
  for (int k = 0; k < 2; ++k) {
    if (comm->me != 0 || limit[k] == 0 || most[k] <= limit[k]) continue;
    error->warning(
        FLERR,
        "Pair style moe: an atom has {} neighbors within {} A, in training the model saw at most {}: all are "
        "used, but the structure is denser than what the model knows",
        most[k], radius[k], limit[k]);
  }
}

/// Stop all ranks: the others may be waiting in an exchange, which error->one() ends.
void PairMoE::fail(const std::string& message, bool out_of_memory, bool not_finite) {
  if (out_of_memory) {
    error->one(FLERR, "Pair style moe: {} atoms on rank {} ({} in all on {} ranks): {}", impl->n_local,
               comm->me, atom->natoms, comm->nprocs, message);
  }
  if (!not_finite) error->one(FLERR, "Pair style moe (rank " + std::to_string(comm->me) + "): " + message);

  // What the user can look at is the atom in the most extreme environment, which is where the closest
  // neighbour is, of whichever rank.
  const Impl& s = *impl;
  if (s.evaluator->keeps_lists()) {  // where only the nearest pairs have been looked at
    const int64_t n_edge = s.has_list ? s.list.edge_from.size(0) : 0;
    for (int64_t edge = 0; edge < n_edge; ++edge) {
      const auto i = static_cast<int>(s.list.edge_from.const_data_ptr<int64_t>()[edge]);
      const auto j = static_cast<int>(s.list.edge_to.const_data_ptr<int64_t>()[edge]);
      note_pair(i, j, distance2(i, j));
    }
  }
  const Extremes& closest = s.extremes;
  if (!std::isfinite(closest.distance2))
    error->one(FLERR, "Pair style moe (rank " + std::to_string(comm->me) + "): " + message);
  if (closest.distance2 == 0.0) error->one(FLERR, overlap(closest));
  error->one(FLERR,
             "Pair style moe: energies or forces are not finite on rank {}: the closest atoms are {} at "
             "{:.6g} {:.6g} {:.6g} "
             "and {}, {:.4g} A apart ({})",
             comm->me, static_cast<tagint>(closest.first), closest.x[0], closest.x[1], closest.x[2],
             static_cast<tagint>(closest.second), closest.distance(), message);
}

// --- communication: a row of the exchange buffer per atom ----------------------------------------

int PairMoE::pack_forward_comm(int n, int* list, double* buf, int /*pbc_flag*/, int* /*pbc*/) {
  for (int i = 0; i < n; ++i) {
    std::memcpy(buf + static_cast<size_t>(i) * comm_forward, impl->of_atom(list[i]), impl->row_bytes());
  }
  return n * comm_forward;
}

void PairMoE::unpack_forward_comm(int n, int first, double* buf) {
  for (int i = 0; i < n; ++i) {
    std::memcpy(impl->of_atom(first + i), buf + static_cast<size_t>(i) * comm_forward, impl->row_bytes());
  }
}

int PairMoE::pack_reverse_comm(int n, int first, double* buf) {
  for (int i = 0; i < n; ++i) {
    std::memcpy(buf + static_cast<size_t>(i) * comm_reverse, impl->of_atom(first + i), impl->row_bytes());
  }
  return n * comm_reverse;
}

void PairMoE::unpack_reverse_comm(int n, int* list, double* buf) {
  for (int i = 0; i < n; ++i) impl->add(impl->of_atom(list[i]), buf + static_cast<size_t>(i) * comm_reverse);
}

/// "n_lists": how often the evaluator got a new neighbour list (a double), where it keeps lists.
void* PairMoE::extract(const char* name, int& dim) {
  dim = 0;
  return std::strcmp(name, "n_lists") == 0 ? &impl->n_lists : nullptr;
}

double PairMoE::memory_usage() { return Pair::memory_usage() + impl->memory(); }

}  // namespace LAMMPS_NS
