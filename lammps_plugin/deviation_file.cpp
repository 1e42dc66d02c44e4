#include "deviation_file.h"

#include <algorithm>

#include "fmt/format.h"

namespace LAMMPS_NS {

bool DeviationFile::open(const std::string& name, bool atomic, bool append) {
  // an input that comes back to a file keeps what it wrote there
  const bool goes_on = append || std::find(begun_.begin(), begun_.end(), name) != begun_.end();
  file_.reset(std::fopen(name.c_str(), goes_on ? "a" : "w"));
  if (!file_) return false;
  begun_.push_back(name);
  // a restarted run whose file is gone starts one
  if (goes_on && std::fseek(file_.get(), 0, SEEK_END) == 0 && std::ftell(file_.get()) > 0) return true;
  std::string header = fmt::format("#{:>11}", "step");
  for (const char* const name_of_column :
       {"max_devi_v", "min_devi_v", "avg_devi_v", "max_devi_f", "min_devi_f", "avg_devi_f"}) {
    header += fmt::format("{:>19}", name_of_column);
  }
  if (atomic) header += fmt::format("{:>19}", "atm_devi_f(N)");
  header += '\n';
  std::fputs(header.c_str(), file_.get());
  return std::fflush(file_.get()) == 0;
}

bool DeviationFile::write(bigint step, const std::array<double, 6>& summary,
                          const std::vector<double>& of_atom) {
  std::string line = fmt::format("{:>12}", step);
  for (const double value : summary) line += fmt::format(" {:18.6e}", value);
  for (const double value : of_atom) line += fmt::format(" {:18.6e}", value);
  line += '\n';
  std::fputs(line.c_str(), file_.get());
  return std::fflush(file_.get()) == 0 && std::ferror(file_.get()) == 0;
}

}  // namespace LAMMPS_NS
