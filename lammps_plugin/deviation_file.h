// DeePMD-kit's model_devi.out, which tools of active learning read.
#pragma once

#include <array>
#include <cstdio>
#include <memory>
#include <string>
#include <vector>

#include "lmptype.h"

namespace LAMMPS_NS {

/// The file of one rank, which is rank 0.
class DeviationFile {
 public:
  /// Starts the file with its header, or goes on at its end, as with all that were opened before. Returns
  /// whether it can be written.
  bool open(const std::string& name, bool atomic, bool append);
  bool is_open() const { return file_ != nullptr; }
  void close() { file_.reset(); }

  /// A line: the step, summary of virials and of forces, and deviations of atoms, if they are asked for.
  /// Returns whether all of it was written.
  bool write(bigint step, const std::array<double, 6>& summary, const std::vector<double>& of_atom);

 private:
  struct Close {
    void operator()(FILE* file) const { std::fclose(file); }
  };
  std::unique_ptr<FILE, Close> file_;
  std::vector<std::string> begun_;  // names of all files so far
};

}  // namespace LAMMPS_NS
