#include "pair_moe.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "atom.h"
#include "comm.h"
#include "deviation.h"
#include "deviation_file.h"
#include "error.h"
#include "force.h"
#include "loaded_models.h"
#include "memory.h"
#include "moecalc/evaluator.h"
#include "neighbor.h"
#include "pair_settings.h"
#include "step.h"
#include "type_check.h"
#include "update.h"
#include "utils.h"

namespace LAMMPS_NS {

namespace {

void write_text(FILE* fp, const std::string& text) {
  const int size = static_cast<int>(text.size());
  fwrite(&size, sizeof(int), 1, fp);
  fwrite(text.data(), 1, text.size(), fp);
}

/// Whether a word of pair_coeff is another package, not an element.
bool names_file(const std::string& word) {
  return word == "default" || word.find('.') != std::string::npos || word.find('/') != std::string::npos;
}

/// Counterpart of write_text; rank 0 reads, all ranks get it.
std::string read_text(FILE* fp, MPI_Comm world, Error* error) {
  int me = 0;
  int size = 0;
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

class PairMoE::Impl {
 public:
  Impl(LAMMPS* lmp, PairMoE* pair) : models(lmp), step(lmp, pair, models), deviation(lmp) {}

  // from the input script
  PairSettings settings;
  std::vector<std::string> files;        // as given, at least one
  std::vector<std::string> type_labels;  // element (or NULL) per atom type, as given
  double energy_scale = 1.0;             // from eV to the energy unit of the simulation

  LoadedModels models;
  bool types_checked = false;     // since the models were loaded
  bool conditions_given = false;  // to the models
  // whether init_style() has been called since the input changed anything of the above
  bool is_ready = false;

  Step step;

  // of several models
  Deviation deviation;
  std::array<double, 6> last_deviation{};  // on rank 0; what `compute pair` sums over ranks
  DeviationFile deviation_file;            // on rank 0
  DeviationSettings written;               // with which it was opened
  bool from_restart = false;               // goes on with the file of an earlier run
};

// --- set-up --------------------------------------------------------------------------------------

PairMoE::PairMoE(LAMMPS* lmp) : Pair(lmp), impl(std::make_unique<Impl>(lmp, this)) {
  single_enable = 0;
  restartinfo = 1;
  one_coeff = 1;
  manybody_flag = 1;
  respa_enable = 0;
  no_virial_fdotr_compute = 1;
  centroidstressflag = CENTROID_AVAIL;
  unit_convert_flag = utils::get_supported_conversions(utils::ENERGY);
  pvector = impl->last_deviation.data();
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
  PairSettings wanted;
  try {
    wanted = PairSettings::parse({arg, arg + narg});
  } catch (const moecalc::Error& exception) {
    error->all(FLERR, "Pair style moe: " + std::string(exception.what()));
  }
  check_units();
  if (!wanted.loads_the_same(impl->settings)) {
    impl->models.unload();  // loaded again in init_style()
    impl->is_ready = false;
  }
  if (!same(wanted.given, impl->settings.given)) impl->conditions_given = impl->is_ready = false;
  if (wanted.deviation != impl->settings.deviation) impl->is_ready = false;  // the file opens in init_style()
  impl->settings = wanted;
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
  int first_label = 3;
  while (first_label < narg && names_file(arg[first_label])) ++first_label;
  const std::vector<std::string> labels(arg + first_label, arg + narg);
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
  impl->files.assign(arg + 2, arg + first_label);
  impl->type_labels = labels;
  load_models();

  if (!allocated) allocate();
  const std::vector<int>& element = impl->models.first().element_of_type();
  for (int i = 1; i <= n_types; ++i) {
    for (int j = i; j <= n_types; ++j) {
      setflag[i][j] = element[i] != not_mapped && element[j] != not_mapped;
    }
  }
}

void PairMoE::load_models() {
  check_units();
  impl->types_checked = impl->conditions_given = impl->is_ready = false;
  impl->step.forget_list();
  impl->models.load(impl->files, impl->type_labels, impl->settings);
  impl->conditions_given = true;
  comm_forward = 1;  // who owns an atom
  // `compute pair` has a vector where there is something to tell
  nextra = impl->models.size() > 1 ? static_cast<int>(impl->last_deviation.size()) : 0;
}

/// Collective. A file that is open with the same settings goes on.
void PairMoE::open_deviation_file() {
  const DeviationSettings& wanted = impl->settings.deviation;
  if (impl->models.size() < 2 || wanted.every == 0) {
    impl->deviation_file.close();
    return;
  }
  int is_open = 1;
  const bool same_file = wanted.file == impl->written.file && wanted.atomic == impl->written.atomic;
  if (comm->me == 0 && !(impl->deviation_file.is_open() && same_file)) {
    is_open = impl->deviation_file.open(wanted.file, wanted.atomic, impl->from_restart) ? 1 : 0;
  }
  MPI_Bcast(&is_open, 1, MPI_INT, 0, world);
  if (is_open == 0) {
    error->all(FLERR,
               "Pair style moe: expected out_file {} in a folder that can be written, got an error of the "
               "file system",
               wanted.file);
  }
  impl->written = wanted;
}

void PairMoE::init_style() {
  if (force->newton_pair == 0) error->all(FLERR, "Pair style moe: expected newton on, got newton pair off");
  if (atom->tag_enable == 0) error->all(FLERR, "Pair style moe: expected atom IDs, got atom_modify id no");
  check_units();
  if (!impl->models.is_loaded()) load_models();  // from a restart file, or after another pair_style command
  if (!impl->conditions_given) {
    impl->models.give_conditions(impl->settings.given);
    impl->conditions_given = true;
  }
  impl->step.start_run();
  if (!impl->types_checked) TypeCheck(lmp).warn(impl->type_labels);
  impl->types_checked = true;
  open_deviation_file();

  // A hybrid style read the size of our exchange before the model was known.
  if (force->pair != nullptr && force->pair != this) {
    force->pair->comm_forward = std::max(force->pair->comm_forward, comm_forward);
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

double PairMoE::init_one(int /*i*/, int /*j*/) { return impl->models.committee().cutoff(); }

// --- restart -------------------------------------------------------------------------------------

void PairMoE::write_restart(FILE* fp) {
  write_restart_settings(fp);
  write_text(fp, joined(impl->files, "\n"));  // names may have blanks
  write_text(fp, joined(impl->type_labels));
}

/// The models themselves are loaded in init_style(), so that a pair_coeff command can name another file
/// before.
void PairMoE::read_restart(FILE* fp) {
  read_restart_settings(fp);
  impl->files = utils::split_lines(read_text(fp, world, error));
  impl->type_labels = utils::split_words(read_text(fp, world, error));
  if (impl->files.empty()) return;
  if (!allocated) allocate();
  for (int i = 1; i <= atom->ntypes; ++i) {
    for (int j = i; j <= atom->ntypes; ++j) setflag[i][j] = 1;
  }
}

void PairMoE::write_restart_settings(FILE* fp) {
  write_text(fp, impl->settings.device);
  write_text(fp, impl->settings.dtype);
  write_text(fp, impl->settings.precision);
  // in one text, so that the files of versions that knew no conditions can be read
  write_text(fp, joined(impl->settings.words_of_rest()));
}

void PairMoE::read_restart_settings(FILE* fp) {
  impl->from_restart = true;
  impl->settings.device = read_text(fp, world, error);
  impl->settings.dtype = read_text(fp, world, error);
  impl->settings.precision = read_text(fp, world, error);
  try {
    impl->settings.set_rest(utils::split_words(read_text(fp, world, error)));
  } catch (const moecalc::Error& exception) {
    error->all(FLERR, "Pair style moe: damaged restart file: " + std::string(exception.what()));
  }
}

// --- every step ----------------------------------------------------------------------------------

void PairMoE::compute(int eflag, int vflag) {
  if (!impl->is_ready) {
    error->all(
        FLERR,
        "Pair style moe: pair_style or pair_coeff changed the model since the last run: expected a run "
        "with `pre yes`, got `pre no`");
  }
  ev_init(eflag, vflag);
  moecalc::Request request;
  const bool deviates = deviates_now();
  request.virial = vflag_global != 0 || deviates;
  request.atom_virial = vflag_atom != 0 || cvflag_atom != 0;
  const std::vector<moecalc::Evaluation> results = impl->step.evaluate(request, deviates);
  add_forces(results[0]);
  add_energies(results[0]);
  add_virials(results[0]);
  if (deviates) tell_deviation(results);
}

bool PairMoE::deviates_now() const {
  const int64_t every = impl->settings.deviation.every;
  return impl->models.size() > 1 && every > 0 && update->ntimestep % every == 0;
}

/// Collective.
void PairMoE::tell_deviation(const std::vector<moecalc::Evaluation>& results) {
  StepDeviation found;
  std::vector<double> of_atoms;
  try {
    found = impl->deviation.measure(results, impl->step.n_local(), impl->settings.deviation,
                                    impl->energy_scale, impl->step.exchange());
    if (impl->settings.deviation.atomic) of_atoms = impl->deviation.gather(found, impl->step.atom_of_row());
  } catch (const std::exception& exception) {
    error->one(FLERR, "Pair style moe: " + std::string(exception.what()));
  }
  if (comm->me != 0) return;
  impl->last_deviation = found.summary;
  if (!impl->deviation_file.write(update->ntimestep, found.summary, of_atoms)) {
    error->one(FLERR,
               "Pair style moe: expected {} to take a line, got an error of the file system: is the disk "
               "full?",
               impl->written.file);
  }
}

void PairMoE::add_forces(const moecalc::Evaluation& result) {
  const auto* force_of = result.forces.data<double>();
  for (const int i : impl->step.atom_of_row()) {
    for (int k = 0; k < 3; ++k) atom->f[i][k] += impl->energy_scale * force_of[k];
    force_of += 3;
  }
}

void PairMoE::add_energies(const moecalc::Evaluation& result) {
  const double scale = impl->energy_scale;
  if (eflag_global) eng_vdwl += scale * *result.energy.data<double>();
  if (!eflag_atom) return;
  const auto* energy_of = result.energies.data<double>();
  for (int64_t row = 0; row < result.energies.size(0); ++row) {
    eatom[impl->step.atom_of_row()[row]] += scale * energy_of[row];
  }
}

/// LAMMPS' orders: xx yy zz xy xz yz, and for centroid virials (first index position, second force) yx zx zy
/// in addition.
void PairMoE::add_virials(const moecalc::Evaluation& result) {
  constexpr int first[9] = {0, 1, 2, 0, 0, 1, 1, 2, 2};
  constexpr int second[9] = {0, 1, 2, 1, 2, 2, 0, 0, 1};
  const double scale = impl->energy_scale;
  const auto symmetric = [&](const double* w, int k) {
    return 0.5 * scale * (w[3 * first[k] + second[k]] + w[3 * second[k] + first[k]]);
  };
  if (vflag_global) {
    for (int k = 0; k < 6; ++k) virial[k] += symmetric(result.virial.data<double>(), k);
  }
  if (!vflag_atom && !cvflag_atom) return;
  const auto* w = result.atom_virial.data<double>();
  for (const int i : impl->step.atom_of_row()) {
    for (int k = 0; vflag_atom && k < 6; ++k) vatom[i][k] += symmetric(w, k);
    for (int k = 0; cvflag_atom && k < 9; ++k) cvatom[i][k] += scale * w[3 * first[k] + second[k]];
    w += 9;
  }
}

// --- communication: who owns an atom ---------------------------------------------------------------

int PairMoE::pack_forward_comm(int n, int* list, double* buf, int /*pbc_flag*/, int* /*pbc*/) {
  return impl->step.exchange().pack_owners(n, list, buf);
}

void PairMoE::unpack_forward_comm(int n, int first, double* buf) {
  impl->step.exchange().unpack_owners(n, first, buf);
}

// --- what LAMMPS may ask -------------------------------------------------------------------------

/// Doubles of this rank. "n_lists": how often the evaluator got a new neighbor list. "exchanges", "messages",
/// "rows", "bytes": what was sent to other ranks for the features of ghosts and their gradients.
void* PairMoE::extract(const char* name, int& dim) {
  dim = 0;
  AtomExchange::Traffic& traffic = impl->step.exchange().traffic();
  const std::pair<const char*, double*> known[] = {{"n_lists", impl->step.n_lists()},
                                                   {"exchanges", &traffic.exchanges},
                                                   {"messages", &traffic.messages},
                                                   {"rows", &traffic.rows},
                                                   {"bytes", &traffic.bytes}};
  for (const auto& [known_name, value] : known) {
    if (std::strcmp(name, known_name) == 0) return value;
  }
  return nullptr;
}

double PairMoE::memory_usage() { return Pair::memory_usage() + impl->step.memory(); }

}  // namespace LAMMPS_NS
