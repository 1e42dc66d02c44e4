// Writes element argv[1] of the first of two arrays of ten floats in shared memory.
#include <cstdlib>
#include <vector>

#include "kernels/cuda/block.cuh"

int main(int, char** arguments) {
  using namespace moecalc::cuda;
  const int64_t bytes = 2 * shared_size<float>(10);
  std::vector<double> memory(static_cast<size_t>(bytes + HostBlock::kRedZones) / sizeof(double) + 1);
  HostBlock block(0, 1, reinterpret_cast<char*>(memory.data()), bytes, false);
  float* first = block.shared<float>(10);
  block.shared<float>(10)[0] = 1;
  first[std::atoi(arguments[1])] = 1;
}
