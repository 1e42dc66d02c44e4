#include "ghost_exchange.h"

#include <dlfcn.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <numeric>
#include <string>

#include "comm.h"
#include "pair.h"

namespace LAMMPS_NS {

namespace {

constexpr int tag = 1;

// An owner as one double: exact for four million ranks.
constexpr double atoms_per_rank = 2147483648.0;
double owner_code(int rank, int atom) { return rank * atoms_per_rank + atom; }
int rank_of(double code) { return static_cast<int>(code / atoms_per_rank); }
int atom_of(double code) { return static_cast<int>(code - rank_of(code) * atoms_per_rank); }

bool is_set(const char* variable) {
  const char* text = std::getenv(variable);
  return text != nullptr && std::string(text) != "0" && *text != '\0';
}

template <typename T>
void add_row(T* sum, const T* summand, int64_t width) {
  for (int64_t k = 0; k < width; ++k) sum[k] += summand[k];
}

}  // namespace

AtomExchange::~AtomExchange() noexcept {
  int finalized = 0;
  MPI_Finalized(&finalized);
  if (finalized == 0 && ranks_ != MPI_COMM_NULL) MPI_Comm_free(&ranks_);
}

bool AtomExchange::mpi_takes_device_memory() {
  if (std::getenv("MOECALC_DEVICE_MPI") != nullptr) return is_set("MOECALC_DEVICE_MPI");
  using Query = int();
  if (auto* const query = reinterpret_cast<Query*>(dlsym(RTLD_DEFAULT, "MPIX_Query_cuda_support"))) {
    return query() == 1;
  }
  // Cray MPICH and MVAPICH, which have no such function
  return is_set("MPICH_GPU_SUPPORT_ENABLED") || is_set("MV2_USE_CUDA");
}

// --- who sends what to whom ----------------------------------------------------------------------

void AtomExchange::make_plan() {
  if (ranks_ == MPI_COMM_NULL) MPI_Comm_dup(world, &ranks_);
  owners_.assign(map_.n_atom(), -1.0);
  for (int64_t row = 0; row < map_.n_local(); ++row) {
    const int atom = map_.atom_of_row()[row];
    owners_[atom] = owner_code(comm->me, atom);
  }
  comm->forward_comm(pair_);
  find_sources();
  find_destinations();
  plan_.of_device = mpi_takes_device_memory();
  ++plan_.version;
}

/// Ghosts by their owners.
void AtomExchange::find_sources() {
  const std::vector<int>& atoms = map_.atom_of_row();
  const auto code = [&](int64_t row) { return owners_[atoms[row]]; };
  plan_.received.resize(atoms.size() - static_cast<size_t>(map_.n_local()));
  std::iota(plan_.received.begin(), plan_.received.end(), map_.n_local());
  std::sort(plan_.received.begin(), plan_.received.end(),
            [&](int64_t a, int64_t b) { return code(a) < code(b); });
  sources_ = {};
  wanted_.clear();
  std::vector<int> n_from(comm->nprocs, 0);
  for (const int64_t row : plan_.received) {
    if (code(row) < 0.0)
      throw moecalc::Error("a ghost of an atom that its owner does not have: was it lost?");
    ++n_from[rank_of(code(row))];
    wanted_.push_back(atom_of(code(row)));
  }
  for (int rank = 0; rank < comm->nprocs; ++rank) sources_.add(rank, n_from[rank]);
}

/// What others want of this rank.
void AtomExchange::find_destinations() {
  const auto n_ranks = static_cast<size_t>(comm->nprocs);
  std::vector<int> n_from(n_ranks, 0);
  std::vector<int> n_to(n_ranks, 0);
  for (size_t k = 0; k < sources_.ranks.size(); ++k) n_from[sources_.ranks[k]] = sources_.count(k);
  MPI_Alltoall(n_from.data(), 1, MPI_INT, n_to.data(), 1, MPI_INT, ranks_);
  destinations_ = {};
  for (int rank = 0; rank < comm->nprocs; ++rank) destinations_.add(rank, n_to[rank]);
  std::vector<int> atoms(destinations_.first.back());
  // the way of gradients: from those who have the ghosts
  requests_.clear();
  start_messages(destinations_, reinterpret_cast<char*>(atoms.data()), sizeof(int), false);
  start_messages(sources_, reinterpret_cast<char*>(wanted_.data()), sizeof(int), true);
  MPI_Waitall(static_cast<int>(requests_.size()), requests_.data(), MPI_STATUSES_IGNORE);
  plan_.sent.clear();
  for (const int atom : atoms) plan_.sent.push_back(map_.row_of_atom(atom));
}

int AtomExchange::pack_owners(int n, const int* atoms, double* buf) const {
  for (int i = 0; i < n; ++i) buf[i] = owners_[atoms[i]];
  return n;
}

void AtomExchange::unpack_owners(int n, int first, const double* buf) {
  std::copy_n(buf, n, owners_.begin() + first);
}

// --- the exchange ----------------------------------------------------------------------------------

void AtomExchange::start_messages(const Partners& partners, char* rows, int64_t row_bytes, bool sends) {
  for (size_t k = 0; k < partners.ranks.size(); ++k) {
    const int64_t bytes = partners.count(k) * row_bytes;
    if (bytes > std::numeric_limits<int>::max()) {
      throw moecalc::Error("expected less than 2 GiB in a message, got " + std::to_string(bytes) +
                           " bytes: use more ranks");
    }
    char* const part = rows + partners.first[k] * row_bytes;
    requests_.emplace_back();
    if (sends) {
      MPI_Isend(part, static_cast<int>(bytes), MPI_BYTE, partners.ranks[k], tag, ranks_, &requests_.back());
    } else {
      MPI_Irecv(part, static_cast<int>(bytes), MPI_BYTE, partners.ranks[k], tag, ranks_, &requests_.back());
    }
  }
}

void AtomExchange::exchange(void* sent, void* received, int64_t row_bytes, bool back) {
  requests_.clear();
  start_messages(sources_, static_cast<char*>(received), row_bytes, back);
  start_messages(destinations_, static_cast<char*>(sent), row_bytes, !back);
  MPI_Waitall(static_cast<int>(requests_.size()), requests_.data(), MPI_STATUSES_IGNORE);
  const Partners& to = back ? sources_ : destinations_;
  traffic_.exchanges += 1;
  traffic_.messages += static_cast<double>(to.ranks.size());
  traffic_.rows += to.first.back();
  traffic_.bytes += static_cast<double>(to.first.back()) * static_cast<double>(row_bytes);
}

/// Bytes of a row; makes the buffers as large as the plan wants them.
size_t AtomExchange::check(const moecalc::Array& rows) const {
  const size_t n_row = map_.atom_of_row().size();
  if (static_cast<size_t>(rows.size(0)) != n_row) {
    throw moecalc::Error("expected features of " + std::to_string(n_row) + " atoms, got " +
                         moecalc::shown(rows.shape()) + ": package the checkpoint again");
  }
  return static_cast<size_t>(rows.size(1)) * moecalc::bytes_of(rows.dtype());
}

void AtomExchange::forward(moecalc::Array features) {
  const size_t size = check(features);
  auto* const data = static_cast<char*>(features.bytes_data());
  sent_.resize(plan_.sent.size() * size);
  received_.resize(plan_.received.size() * size);
  char* to = sent_.data();
  for (const int64_t row : plan_.sent) to = std::copy_n(data + row * size, size, to);
  exchange(sent_.data(), received_.data(), static_cast<int64_t>(size), false);
  const char* from = received_.data();
  for (const int64_t row : plan_.received) {
    std::memcpy(data + row * size, from, size);
    from += size;
  }
}

void AtomExchange::reverse(moecalc::Array gradients) {
  const size_t size = check(gradients);
  auto* const data = static_cast<char*>(gradients.bytes_data());
  sent_.resize(plan_.sent.size() * size);
  received_.resize(plan_.received.size() * size);
  char* to = received_.data();
  for (const int64_t row : plan_.received) to = std::copy_n(data + row * size, size, to);
  exchange(sent_.data(), received_.data(), static_cast<int64_t>(size), true);
  const char* from = sent_.data();
  for (const int64_t row : plan_.sent) {
    if (gradients.dtype() == moecalc::Dtype::float32) {
      add_row(reinterpret_cast<float*>(data + row * size), reinterpret_cast<const float*>(from),
              gradients.size(1));
    } else {
      add_row(reinterpret_cast<double*>(data + row * size), reinterpret_cast<const double*>(from),
              gradients.size(1));
    }
    from += size;
  }
}

void AtomExchange::sum(moecalc::Array values) {
  MPI_Allreduce(MPI_IN_PLACE, values.data<double>(), static_cast<int>(values.numel()), MPI_DOUBLE, MPI_SUM,
                world);
}

double AtomExchange::memory() const {
  const size_t n_int = plan_.sent.capacity() * 2 + plan_.received.capacity() * 2 + wanted_.capacity();
  return static_cast<double>(sent_.capacity() + received_.capacity() + owners_.capacity() * sizeof(double) +
                             n_int * sizeof(int));
}

}  // namespace LAMMPS_NS
