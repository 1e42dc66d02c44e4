#include "ghost_exchange.h"

#include <mpi.h>

#include <cstring>
#include <string>

#include "comm.h"
#include "pair.h"

namespace LAMMPS_NS {

void AtomExchange::forward(moecalc::Array features) {
  start(features);
  const auto n_local = static_cast<size_t>(map_.n_local());
  copy_to_atoms(n_local);
  comm->forward_comm(pair_);
  copy_from_atoms(n_local, map_.atom_of_row().size());
}

void AtomExchange::reverse(moecalc::Array gradients) {
  start(gradients);
  // Ghosts may be sent on over several ranks, so all atoms have a row of the buffer, nodes or not.
  copy_to_atoms(map_.atom_of_row().size());
  comm->reverse_comm(pair_);
  copy_from_atoms(0, static_cast<size_t>(map_.n_local()));
}

void AtomExchange::sum(moecalc::Array values) {
  MPI_Allreduce(MPI_IN_PLACE, values.data<double>(), static_cast<int>(values.numel()), MPI_DOUBLE, MPI_SUM,
                world);
}

void AtomExchange::start(const moecalc::Array& rows) {
  is_float_ = rows.dtype() == moecalc::Dtype::float32;
  const int stride = doubles_per_row(rows.size(1), is_float_);
  const size_t n_row = map_.atom_of_row().size();
  if (stride != pair_->comm_forward || static_cast<size_t>(rows.size(0)) != n_row) {
    throw moecalc::Error("expected features of " + std::to_string(n_row) + " atoms in " +
                         std::to_string(pair_->comm_forward) + " doubles each, got " +
                         moecalc::shown(rows.shape()) + ": package the checkpoint again");
  }
  data_ = static_cast<char*>(rows.bytes_data());
  row_bytes_ = static_cast<size_t>(rows.size(1)) * moecalc::bytes_of(rows.dtype());
  buffer_.assign(map_.n_atom() * row_bytes_, 0);
}

void AtomExchange::copy_to_atoms(size_t n_row) {
  for (size_t row = 0; row < n_row; ++row) {
    std::memcpy(of_atom(map_.atom_of_row()[row]), of_row(row), row_bytes_);
  }
}

void AtomExchange::copy_from_atoms(size_t first, size_t end) {
  for (size_t row = first; row < end; ++row) {
    std::memcpy(of_row(row), of_atom(map_.atom_of_row()[row]), row_bytes_);
  }
}

void AtomExchange::pack_forward(int n, const int* atoms, double* buf, int stride) const {
  for (int i = 0; i < n; ++i) {
    std::memcpy(buf + static_cast<size_t>(i) * stride, of_atom(atoms[i]), row_bytes_);
  }
}

void AtomExchange::unpack_forward(int n, int first, const double* buf, int stride) {
  for (int i = 0; i < n; ++i) {
    std::memcpy(of_atom(first + i), buf + static_cast<size_t>(i) * stride, row_bytes_);
  }
}

void AtomExchange::pack_reverse(int n, int first, double* buf, int stride) const {
  for (int i = 0; i < n; ++i) {
    std::memcpy(buf + static_cast<size_t>(i) * stride, of_atom(first + i), row_bytes_);
  }
}

void AtomExchange::unpack_reverse(int n, const int* atoms, const double* buf, int stride) {
  for (int i = 0; i < n; ++i) {
    const double* const summand = buf + static_cast<size_t>(i) * stride;
    if (is_float_) {
      add<float>(of_atom(atoms[i]), summand);
    } else {
      add<double>(of_atom(atoms[i]), summand);
    }
  }
}

template <typename T>
void AtomExchange::add(char* sum, const double* summand) const {
  auto* const into = reinterpret_cast<T*>(sum);
  const auto* const from = reinterpret_cast<const T*>(summand);
  for (size_t k = 0; k < row_bytes_ / sizeof(T); ++k) into[k] += from[k];
}

}  // namespace LAMMPS_NS
